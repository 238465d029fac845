"""Gradients of margins against torch.autograd on the whole model, and responses against moved weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from circuitpress.behaviors import Behavior
from circuitpress.lean import damped_factor, load_gradients
from circuitpress.margins import half_of, responses, write_gradients
from circuitpress.price import load_hessians, price, shard_path
from circuitpress.score.metrics import as_decision, rows_of, sites_of
from circuitpress.stream import open_stream

from .score.test_metrics import contrasts, sentences
from .whole import linears, load, tokens, weight

CPU = torch.device("cpu")


def margins(model: Any, behavior: Behavior) -> Tensor:
    """The margin of every pair [n], differentiable."""
    decision = as_decision(behavior)
    sites = sites_of(decision, 0, len(rows_of(decision)))
    logits = model(rows_of(decision), use_cache=False).logits[sites.row, sites.position]
    if decision.metric == "sentence":
        values = sites.weight * logits.log_softmax(-1).gather(1, sites.target[:, None])[:, 0]
    else:
        values = (logits.gather(1, sites.target[:, None]) - logits.gather(1, sites.other[:, None]))[:, 0]
    return torch.zeros(len(behavior), dtype=values.dtype).index_add(0, sites.row % len(behavior), values)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("behavior", [contrasts(), sentences()], ids=["contrasts", "sentences"])
def test_gradients_are_those_of_the_mean_margin_of_each_half(
    name: str, behavior: Behavior, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    stream = open_stream(folder, batch_tokens=20)
    write_gradients(stream, behavior, tmp_path)
    model = load(folder)
    halves = half_of(as_decision(behavior))[: len(behavior)]
    for half in (0, 1):
        model.zero_grad()
        margins(model, behavior)[halves == half].mean().backward()
        for place in stream.anatomy.blocks:
            found = load_gradients(tmp_path, place, half, CPU)
            for module, gradient in found.items():
                layer = linears(model)[module]
                expected: Tensor = layer.weight.grad  # pyright: ignore
                expected = expected if isinstance(layer, torch.nn.Linear) else expected.T
                # Stored in bfloat16.
                room = 2e-3 * float(expected.abs().max())
                torch.testing.assert_close(gradient.double(), expected, rtol=5e-3, atol=room)


def test_sentences_of_a_pair_share_a_half_and_shards_are_kept(tiny_llama: Path, tmp_path: Path) -> None:
    assert half_of(sentences()).tolist() == [0, 1, 0, 0, 1, 0]
    stream = open_stream(tiny_llama)
    write_gradients(stream, contrasts(), tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(before) == 3
    write_gradients(stream, contrasts(), tmp_path)
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="pairs: 1 pairs have no halves"):
        write_gradients(stream, contrasts(n=1), tmp_path / "one")


def test_responses_are_what_moved_weights_bring(tiny_llama: Path, tmp_path: Path) -> None:
    """Weights moved by a little of G H^-1 of one half, and the margins of the other half's pairs."""
    stream = open_stream(tiny_llama)
    behaviors = [contrasts(), sentences()]
    folders = [tmp_path / behavior.name for behavior in behaviors]
    for behavior, folder in zip(behaviors, folders, strict=True):
        write_gradients(stream, behavior, folder)
    ids = tokens(6, 15)
    price(stream, ids, formats=("int4g16",), folder=tmp_path / "priced")
    found = responses(stream, folders, calibration=ids, saliency=tmp_path / "priced")
    model, step = load(tiny_llama), 1e-5
    expected = np.zeros((2, 2, 2))  # [half that pulls, behavior that gains, behavior that pulls]
    with torch.no_grad():
        before = [margins(model, behavior) for behavior in behaviors]
        for half in (0, 1):
            for c, folder in enumerate(folders):
                moves = {}
                for place in stream.anatomy.blocks:
                    hessians = load_hessians(tmp_path / "priced", place, CPU)
                    for module, gradient in load_gradients(folder, place, half, CPU).items():
                        factor = damped_factor(hessians[module])
                        assert factor is not None
                        moves[module] = torch.cholesky_solve(gradient.T, factor).T.double()
                size = max(float(move.abs().max()) for move in moves.values())
                for module, move in moves.items():
                    weight(linears(model)[module]).add_(move, alpha=step / size)
                for b, behavior in enumerate(behaviors):
                    other = half_of(as_decision(behavior))[: len(behavior)] != half
                    gained = (margins(model, behavior) - before[b])[other].mean()
                    expected[half, b, c] = float(gained) * size / step
                for module, move in moves.items():
                    weight(linears(model)[module]).sub_(move, alpha=step / size)
    # K[b, c] is symmetric: half of what the second halves pull, half of what the first do.
    mean = expected.mean(0)
    room = 1e-2 * np.abs(mean).max()
    np.testing.assert_allclose(found, (mean + mean.T) / 2, rtol=2e-2, atol=room)
    assert shard_path(folders[0], 0).exists()
