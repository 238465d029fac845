"""Rounding one resident block by plan: rebuild the Hessians from the saved token weights, then quantize each matrix.

Pricing needs gradients, rounding only their per-token weights s, which pricing left in its shards. A forward walk with
H = E[s x x^T] therefore gives `apply` and the probes the same Hessians that were priced. Of a small model the shards
hold the Hessians themselves, and nobody needs to walk (`context`).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from .anatomy import Block
from .formats import CastFormat, parse
from .hooks import weight_of
from .lean import leant
from .price import has_feedback, has_hessians, load_hessians, load_saliency, permute_inputs, permute_neurons
from .quantize import Quantized, quantize_matrix
from .score.inputs import add_inputs, matrix_inputs
from .stream import Stream
from .units import Decision

Entry = tuple[str, int, int]
"""Format name, start and stop of one segment."""
NOTHING: Mapping[str, Tensor] = MappingProxyType({})


def block_hessians(
    stream: Stream, module: nn.Module, place: Block, inputs: Callable[[int], Tensor], batches: int, saliency: Path
) -> dict[str, Tensor]:
    """H = E[s x x^T] float32 [cols, cols] of every matrix, from the inputs of the unchanged model or as priced.

    Its diagonal alone where prices were made without feedback.
    """
    if has_hessians(saliency):
        return load_hessians(saliency, place, stream.device)
    weights = {matrix.module: load_saliency(saliency, place.index, matrix.module) for matrix in place.matrices}
    result = {m.module: torch.zeros(m.cols, m.cols, device=stream.device) for m in place.matrices}
    at = 0
    for b in range(batches):
        hidden = inputs(b)
        mine = {name: s[at : at + len(hidden)] / s.numel() for name, s in weights.items()}
        add_inputs(matrix_inputs(stream, module, place, hidden), mine, result)
        at += len(hidden)
    return result if has_feedback(saliency) else {name: h.diagonal().diag() for name, h in result.items()}


def context(calibration: Tensor, saliency: Path) -> Tensor:
    """The part of the windows `calibration` [n, length] whose inputs `block_hessians` will ask for: all or none."""
    return calibration[:0] if has_hessians(saliency) else calibration


def segments_by_module(decisions: Sequence[Decision]) -> dict[str, tuple[str, list[Entry]]]:
    """The axis and the segments of every matrix that the decisions name, in order of their position."""
    found: dict[str, list[tuple[int, int, str, str]]] = {}
    for decision in decisions:
        for segment in decision.group.segments:
            entry = (segment.start, segment.stop, segment.axis, decision.format)
            found.setdefault(segment.module, []).append(entry)
    result = {}
    for module, entries in found.items():
        entries.sort()
        axes = {axis for _, _, axis, _ in entries}
        gaps = any(before[1] != after[0] for before, after in zip(entries, entries[1:], strict=False))
        if len(axes) != 1 or entries[0][0] != 0 or gaps:
            raise ValueError(f"the segments of {module} do not tile it: {entries}")
        result[module] = (axes.pop(), [(form, start, stop) for start, stop, _, form in entries])
    return result


def round_block(
    module: nn.Module, place: Block, plan: Mapping[str, tuple[str, list[Entry]]], hessians: Mapping[str, Tensor],
    order: Tensor | None, *, polish: bool = True, pulled: Mapping[str, Tensor] = NOTHING,
) -> dict[str, Quantized]:  # fmt: skip
    """Quantizes every matrix of a block as `plan` (from `segments_by_module`) says.

    `order` permutes the layer's neurons first; the results are in that order. `polish` improves codes after rounding.
    `pulled` is what rounding leans to (`lean.pulls`).
    """
    result = {}
    for matrix in place.matrices:
        axis, segments = plan[matrix.module]
        weight, hessian = weight_of(module, place, matrix).float(), hessians[matrix.module]
        weight = with_floating(leant(weight, hessian, pulled.get(matrix.module)), weight, axis, segments)
        if order is not None:
            weight = permute_neurons(matrix.role, weight, order)
            hessian = permute_inputs(matrix.role, hessian, order)
        quantized = quantize_matrix(weight, hessian, axis, segments, polish=polish)  # pyright: ignore[reportArgumentType]
        result[matrix.module] = quantized
    return result


def with_floating(moved: Tensor, weight: Tensor, axis: str, segments: Sequence[Entry]) -> Tensor:
    """`moved`, except where segments stay floating-point numbers: those are stored as the checkpoint has them."""
    floating = [(start, stop) for form, start, stop in segments if isinstance(parse(form), CastFormat)]
    if not floating:
        return moved
    if axis == "cols":
        return weight
    moved = moved.clone()
    for start, stop in floating:
        moved[start:stop] = weight[start:stop]
    return moved


def decoded_in_place(quantized: Mapping[str, Quantized], place: Block, order: Tensor | None) -> dict[str, Tensor]:
    """The weights [rows, cols] of what is rounded of a block by local name, neurons back in the model's own order."""
    return in_own_order({name: rounded.decode() for name, rounded in quantized.items()}, place, order)


def in_own_order(weights: Mapping[str, Tensor], place: Block, order: Tensor | None) -> dict[str, Tensor]:
    """`weights` [rows, cols] of a block by module name, with neurons in `order`, as `decoded_in_place` gives them."""
    back = None if order is None else torch.argsort(order)
    there = [matrix for matrix in place.matrices if matrix.module in weights]
    return {
        place.local(m): weights[m.module] if back is None else permute_neurons(m.role, weights[m.module], back)
        for m in there
    }
