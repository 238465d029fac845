"""Scores of edges against derivatives of the brute-force model in float64, and their sums against scores of nodes."""

import numpy as np
import pytest
import torch
from torch import Tensor

from circuitpress.behaviors import Behavior, Pairs
from circuitpress.mech.circuits.attribution import Runs, edge_scores, midpoints, node_scores
from circuitpress.mech.circuits.graph import graph_of
from circuitpress.mech.circuits.parts import record
from circuitpress.score.metrics import metric_gradients
from circuitpress.stream import open_stream

from ...whole import load, tokens
from . import brute

POSITION, ANSWER, WRONG = torch.tensor([5, 3, 5]), torch.tensor([4, 9, 30]), torch.tensor([60, 2, 31])
TASK = Behavior("made up", "logit_diff", Pairs(tokens(3, 6), tokens(3, 6, seed=1), POSITION, ANSWER, WRONG))


def metric(model: object, final: Tensor) -> Tensor:
    """The logit difference of every prompt."""
    logits = brute.logits(model, final)[torch.arange(3), POSITION]
    return logits[torch.arange(3), ANSWER] - logits[torch.arange(3), WRONG]


@pytest.mark.parametrize("alphas", [midpoints(3), (1.0,)])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen3", "tiny_gpt2"])
def test_edges_equal_derivatives_at_the_receivers(
    name: str, alphas: tuple[float, ...], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    stream, model = open_stream(folder, dtype="float64", batch_tokens=12), load(folder)
    graph = graph_of(stream.anatomy)
    assert isinstance(TASK.pairs, Pairs)
    clean, corrupted = (stream.batches(ids) for ids in (TASK.pairs.clean, TASK.pairs.corrupted))
    runs = Runs(record(stream, clean, "a")[0], record(stream, corrupted, "b")[0], (2, 1), alphas)
    scores = edge_scores(stream, graph, runs, lambda final: metric_gradients(stream, TASK, final))

    with torch.no_grad():
        start, end = brute.embed(model, TASK.pairs.clean), brute.embed(model, TASK.pairs.corrupted)
        own, other = brute.run(model, start)[1], brute.run(model, end)[1]
    expected = np.zeros_like(scores)
    for alpha in alphas:
        nudge = {name: torch.zeros_like(start, requires_grad=True) for name in graph.receivers}
        final, _ = brute.run(model, end + alpha * (start - end), nudge=nudge)
        gradients = torch.autograd.grad(metric(model, final).sum(), list(nudge.values()))
        for column, g in enumerate(gradients):
            for row in np.flatnonzero(graph.edges[:, column]):
                change = other[graph.senders[row]] - own[graph.senders[row]]
                expected[:, row, column] += (change * g).sum((1, 2)).numpy() / len(alphas)
    assert np.abs(expected).max() > 0.1
    assert np.allclose(scores, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert (scores[:, ~graph.edges] == 0).all()

    nodes = node_scores(stream, graph, TASK, alphas)
    assert np.allclose(nodes, scores.sum(2)[:, 1:], rtol=0, atol=1e-5 * np.abs(nodes).max())


def test_midpoints() -> None:
    assert midpoints(1) == (0.5,)
    assert midpoints(4) == (0.125, 0.375, 0.625, 0.875)
