"""Fisher scores: what the loss of a unit, or any change of a linear map's output, costs in nats, from gradients.

At the original model KL(original || changed) has no first-order term, so a change dY of the output of a linear map
costs

    1/2 E_t [ (g_t . dY_t)^2 ]        nats per predicted token

where g_t is the gradient, at that output, of the sum of token losses with labels drawn from the model's own softmax
(the true Fisher; with the data's labels the first-order term would not vanish and would reward overfitting).

1. `output_gradients` draws the labels, seeded by the index of the sequence, so that neither the size of
   micro-batches nor a resumed run changes them, and returns the gradient at the output of the last block.
2. `pull` recomputes one block and turns the gradient at its output into one at its input; on the way it hands out the
   input x and the output gradient g of every matrix.
3. `unit_effects` is g_t . dY_t for closing a unit: a head, a key-value group or a neuron.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..anatomy import Block
from ..hooks import capture, weight_of
from ..store import Store
from ..stream import Stream

LOGIT_CHUNK = 1 << 22
"""Logits that exist at a time (16 MiB in float32)."""


class Flow(NamedTuple):
    """What one matrix saw: input x [tokens, cols] and gradient g [tokens, rows] at its output."""

    x: Tensor
    g: Tensor


def output_gradients(
    stream: Stream, batches: Sequence[Tensor], hidden: Store, gradients: Store, *, draws: int, seed: int,
    positions: Tensor | None = None,
) -> list[tuple[int, int]]:  # fmt: skip
    """Fills `gradients` with d(sum of token losses)/d(final hidden states) under keys (b, draw), and returns the keys.

    `hidden` holds the final hidden states [batch, length, hidden] under (depth, b). With `positions` bool [windows,
    length] only the losses of predictions made there count.
    """
    keys, sequence = [], 0
    for b, ids in enumerate(batches):
        states = hidden.get((stream.depth, b), stream.device)
        for draw in range(draws):
            gradient = torch.empty_like(states)
            for row in range(ids.shape[0]):
                uniform = label_noise(seed, sequence + row, draw, ids.shape[1]).to(stream.device)
                gradient[row] = _sequence_gradient(stream, states[row], uniform)
                if positions is not None:
                    gradient[row] *= positions[sequence + row, :, None].to(gradient.device)
            gradients.put((b, draw), gradient)
            keys.append((b, draw))
        sequence += ids.shape[0]
    return keys


def label_noise(seed: int, sequence: int, draw: int, length: int) -> Tensor:
    """The uniform numbers float64 [length] that choose the labels of one sequence in one draw."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + sequence) * 1009 + draw)
    return torch.rand(length, generator=generator, dtype=torch.float64)


def draw_labels(logits: Tensor, uniform: Tensor) -> Tensor:
    """Labels int64 [n] from the softmax of `logits` [n, vocab], by inverting its distribution at `uniform` [n]."""
    steps = logits.detach().softmax(-1).double().cumsum(-1)
    return torch.searchsorted(steps, uniform[:, None] * steps[:, -1:]).clamp(max=logits.shape[-1] - 1)[:, 0]


def _sequence_gradient(stream: Stream, states: Tensor, uniform: Tensor) -> Tensor:
    """Gradient [length, hidden] for one sequence, its labels drawn from the model itself."""
    pieces = []
    step = max(1, LOGIT_CHUNK // stream.anatomy.vocab)
    for part, u in zip(states.split(step), uniform.split(step), strict=True):
        leaf = part.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = stream.logits(leaf)
        labels = draw_labels(logits, u)
        with torch.enable_grad():
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        pieces.append(torch.autograd.grad(loss, leaf)[0])
    return torch.cat(pieces)


def pull(
    stream: Stream, module: nn.Module, place: Block, hidden: Tensor, gradient: Tensor
) -> tuple[Tensor, dict[str, Flow]]:
    """Recomputes resident block `place` on `hidden` and pulls `gradient` back through it.

    Returns the gradient at the block's input and the flow of every matrix, by the matrix's module name.
    """
    names = {matrix.module: place.local(matrix) for matrix in place.matrices}
    leaf = hidden.detach().requires_grad_(True)
    with torch.enable_grad(), capture(module, list(names.values())) as seen:
        output = stream.run(place.index, module, leaf)
    outputs = [y for name in names.values() if (y := seen[name].output) is not None]
    pulled = torch.autograd.grad(output, [leaf, *outputs], gradient)
    flows = {}
    for (name, local), g in zip(names.items(), pulled[1:], strict=True):
        x = seen[local].input
        assert x is not None
        flows[name] = Flow(x.detach().flatten(0, -2), g.flatten(0, -2))
    return pulled[0].detach(), flows


def unit_effects(module: nn.Module, place: Block, flows: Mapping[str, Flow]) -> dict[str, Tensor]:
    """g_t . dY_t [tokens, units] for closing each unit of a kind: `head`, `kv_group`, `neuron`."""
    o, down = place.role("o"), place.role("down")
    heads = _column_effects(flows[o.module], weight_of(module, place, o)).unflatten(1, (place.heads, -1)).sum(-1)
    return {
        "head": heads,
        "kv_group": heads.unflatten(1, (place.kv_heads, -1)).sum(-1),
        "neuron": _column_effects(flows[down.module], weight_of(module, place, down)),
    }


def _column_effects(flow: Flow, weight: Tensor) -> Tensor:
    return -((flow.g @ weight) * flow.x).float()


def saliency(flow: Flow) -> Tensor:
    """The weight of each token in the Hessian of a matrix [tokens]: the mean of g^2 over its rows (GuidedQuant, one
    group).

    H = E[s x x^T] makes the rounding care for the outputs, not only for the matrix (arXiv 2505.07004, eq. 8).
    """
    return flow.g.float().square().mean(1)


def add_second_moment(total: Tensor, x: Tensor, weight: Tensor) -> None:
    """Adds sum_t weight_t x_t x_t^T to `total` float32 [cols, cols]; x is [tokens, cols]."""
    # In float32 whatever the compute type: products rounded to bfloat16 make a Hessian that is not positive definite.
    scaled = x.float() * weight.sqrt()[:, None]
    # The upper triangle in four strips, then its mirror: 5/8 of the work of the whole square. More strips are narrower,
    # and run at a lower rate.
    width = max(64, -(-len(total) // 4))
    for start in range(0, len(total), width):
        stop = min(start + width, len(total))
        strip = total[start:stop, start:]
        strip.addmm_(scaled[:, start:stop].T, scaled[:, start:])
        total[stop:, start:stop] = strip[:, stop - start :].T
