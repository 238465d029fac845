"""Scores of all edges, or of all nodes, from a few backward passes. Evidence: gradient.

With c_s and a_s what sender s writes in the corrupted and in the clean run, and x_r what receiver r reads,

    score(s, r) = sum over positions of (c_s - a_s) . G_r         G_r = mean over k of dm/dx_r at e' + alpha_k (e - e')

estimates m(edge patched) - m(clean) of each prompt: below zero where the edge helps. The inputs e (clean) and e'
(corrupted) of block 0 are interpolated and all activations follow, at the midpoints alpha_k = (k - 1/2) / steps:
integrated gradients over inputs (Hanna et al., arXiv 2403.17806). One gradient at the clean prompts alone, attribution
patching, is a cheap option: on saturated two-layer models it made the decisive head 12 to 49 times too small and named
the wrong one first in 4 of 4, where five steps were right in 4 of 4.

1. Walk up with all interpolated prompts; the inputs of the blocks and the output matrices of all heads are kept.
2. Walk down. A block is recomputed with an input of zeros added for every receiver; the gradients at those zeros are
   the G_r of the receivers, and their sum with the residual path is the gradient at the block's input.
3. In the block, G_r meets the c_s - a_s of all senders below, which are made from z and W_O one block at a time.

Kept per token: steps * depth * hidden numbers of block inputs (spilled to disk if they must), and for the resident
block hidden * (heads + 2 * key-value groups + 1) for G. A node's score is the sum of those of its edges; `node_scores`
gets it from gradients at the senders' outputs, without an input for every receiver.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...behaviors import Behavior
from ...console import Advance, ignore
from ...score.gradients import input_gradients
from ...store import Store
from ...stream import Stream, backward
from .graph import Graph
from .parts import Parts
from .patch import slots
from .split import Split

Gradients = Callable[[Sequence[Tensor]], list[Tensor]]
"""From the final hidden states of all micro-batches to the gradients of the metric there."""


def midpoints(steps: int) -> tuple[float, ...]:
    """Where the interpolation is evaluated: the middle of `steps` equal parts of [0, 1]."""
    return tuple((k + 0.5) / steps for k in range(steps))


@dataclass(frozen=True, eq=False)
class Runs:
    """The two runs whose difference is attributed, on micro-batches of `rows` prompts; 1.0 in `alphas` is clean."""

    clean: Parts
    corrupted: Parts
    rows: tuple[int, ...]
    alphas: tuple[float, ...]

    def difference(self, site: str, layer: int, batch: int, device: torch.device) -> Tensor:
        """c - a at one site."""
        return self.corrupted.get(site, layer, batch, device) - self.clean.get(site, layer, batch, device)  # pyright: ignore


def edge_scores(
    stream: Stream, graph: Graph, runs: Runs, gradients: Gradients, *, advance: Advance = ignore
) -> NDArray[np.float32]:
    """The score of every edge for every prompt [prompts, senders, receivers]; zero where there is no edge."""
    scores = np.zeros((sum(runs.rows), *graph.edges.shape), dtype=np.float32)
    spans = _spans(runs.rows)
    weights: list[Tensor] = []
    store = stream.store("circuit-inputs")

    def meet(b: int, layer: int, columns: slice, g: Tensor, *, own_heads: bool) -> None:
        """Fills `columns` for the senders below `layer` (and for its heads); g is [rows, length, r, hidden]."""
        target = scores[spans[b]]
        target[:, 0, columns] = _dot(runs.difference("embed", 0, b, g.device)[:, :, None], g)[:, 0]
        for below in range(layer + own_heads):
            z = runs.difference("heads", below, b, g.device).unflatten(-1, (graph.heads[below], -1))
            parts = torch.einsum("bthk,dhk->bthd", z, weights[below].to(g.device))
            rows = graph.heads_of(below)
            target[:, rows.start : rows.stop, columns] = _dot(parts, g)
            if below < layer:
                mlp = runs.difference("mlp", below, b, g.device)[:, :, None]
                target[:, graph.mlp_of(below), columns] = _dot(mlp, g)[:, 0]

    def visit(layer: int, module: nn.Module, inputs: Callable[[int], Tensor]) -> None:
        split = Split(stream, module, stream.anatomy.blocks[layer])
        columns = graph.receivers_of(layer)
        for b in range(len(runs.rows)):
            mean = torch.zeros(())
            for k in range(len(runs.alphas)):
                key = b * len(runs.alphas) + k
                g, down[key] = _pull_receivers(split, inputs(key), down[key])
                mean = mean.to(g.device) + g / len(runs.alphas)
            meet(b, layer, slice(columns.start, columns.stop - 1), mean[:, :, :-1], own_heads=False)
            meet(b, layer, slice(columns.stop - 1, columns.stop), mean[:, :, -1:], own_heads=True)
        advance(1, f"block {layer}, backward")

    try:
        down = _climb(stream, runs, gradients, store, advance, lambda split: weights.append(split.output_weight()))
        for b in range(len(runs.rows)):
            top = torch.stack(_of_batch(down, runs, b)).mean(0)[:, :, None]
            meet(b, stream.depth, slice(-1, None), top, own_heads=False)
        backward(stream, store, len(down), visit)
    finally:
        store.clear()
    return scores


def node_scores(
    stream: Stream, graph: Graph, behavior: Behavior, alphas: Sequence[float], *, advance: Advance = ignore
) -> NDArray[np.float32]:
    """The score of every node of `graph.nodes` for every prompt [prompts, nodes].

    An MLP's is the sum over its neurons: what they add to the stream is linear in them.
    """
    units, effects = input_gradients(stream, behavior, alphas, advance=advance)
    index = {name: column for column, name in enumerate(graph.nodes)}
    scores = np.zeros((effects.shape[1], len(index)), dtype=np.float32)
    for unit, effect in zip(units, effects.numpy(), strict=True):
        if unit.kind != "kv_group":
            scores[:, index[f"L{unit.layer}.mlp" if unit.kind == "neuron" else str(unit)]] += effect
    return scores


def _climb(
    stream: Stream, runs: Runs, gradients: Gradients, store: Store, advance: Advance, visit: Callable[[Split], None]
) -> list[Tensor]:
    """Walks the interpolated prompts up; the gradients of the metric at their final states, by batch and step."""
    steps = len(runs.alphas)
    with torch.no_grad():
        for b in range(len(runs.rows)):
            for k, alpha in enumerate(runs.alphas):
                clean = runs.clean.get("embed", 0, b, stream.device)
                store.put((0, b * steps + k), clean + (1 - alpha) * runs.difference("embed", 0, b, stream.device))
        for layer in range(stream.depth):
            with stream.block(layer) as module:
                visit(Split(stream, module, stream.anatomy.blocks[layer]))
                for key in range(len(runs.rows) * steps):
                    hidden = store.get((layer, key), stream.device)
                    store.put((layer + 1, key), stream.run(layer, module, hidden))
            advance(1, f"block {layer}, forward")
    top = [store.get((stream.depth, key), stream.device) for key in range(len(runs.rows) * steps)]
    by_step = [gradients(list(islice(top, k, None, steps))) for k in range(steps)]
    return [by_step[k][b] for b in range(len(runs.rows)) for k in range(steps)]


def _pull_receivers(split: Split, hidden: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients [rows, length, receivers, hidden] at a block's receivers, and the one at its input."""
    order = slots(split)
    zeros = hidden.new_zeros(len(order) + 1, *hidden.shape).requires_grad_(True)
    with torch.enable_grad():
        attention = {slot: hidden + zeros[i] for i, slot in enumerate(order)}
        pieces = split.run(hidden, attention=attention, mlp=lambda _, middle: middle + zeros[-1])
        output = pieces.middle + pieces.mlp
    (g,) = torch.autograd.grad(output, zeros, gradient)
    return g.permute(1, 2, 0, 3), gradient + g.sum(0)


def _of_batch(down: Sequence[Tensor], runs: Runs, b: int) -> list[Tensor]:
    return list(down[b * len(runs.alphas) : (b + 1) * len(runs.alphas)])


def _dot(parts: Tensor, g: Tensor) -> NDArray[np.float32]:
    """Products of [rows, length, s, hidden] and [rows, length, r, hidden], summed over positions: [rows, s, r]."""
    left, right = parts.transpose(1, 2).flatten(2), g.transpose(1, 2).flatten(2)
    return (left @ right.transpose(1, 2)).float().cpu().numpy()


def _spans(rows: Sequence[int]) -> list[slice]:
    stops = np.cumsum(rows)
    return [slice(int(stop) - count, int(stop)) for count, stop in zip(rows, stops, strict=True)]
