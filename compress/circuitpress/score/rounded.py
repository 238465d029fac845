"""What a behavior loses when only this unit is rounded: the exact price of a decision. Evidence: causal.

Importance is not sensitivity. Removing a unit asks what the model is without it; a compressor asks what it is with the
unit's weights a little off. On four trained two-layer models at 2 bits with three heads protected, 13.4 of 15.2 logits
were kept where this chose the heads, 13.2 by patching, 12.7 by one gradient, 12.1 by chance (protection.json).
So the intervention is the decision itself:

1. The weights that protecting the unit would keep (`segments.unit_weights`: rows of q, k, v or gate, up; columns of o
   or down) are taken out as matrices of their own.
2. Each is rounded to the format as compression does it, with error feedback and the second moment of its inputs on the
   behavior's own prompts; nothing else changes, so neighbours do not make up for the error.
3. The block with these weights is a variant; all variants of all blocks ride one walk.

A model whose weights are rounded already (by circuitpress or bitsandbytes) cannot be scored this way: rounding them
again measures another thing. Its activations can still be scored.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ..anatomy import Block
from ..behaviors import Behavior
from ..checkpoint import read_headers
from ..console import Advance, ignore
from ..errors import CheckpointError
from ..formats import resolve
from ..hooks import capture, replace, weight_of
from ..quantize import quantize_everywhere
from ..segments import unit_weights
from ..stream import Stream
from ..units import Scores, UnitId
from .fisher import add_second_moment
from .metrics import mask_of
from .patching import Edit, measure_edits
from .results import to_scores
from .walk import Inputs


def rounding_effects(
    stream: Stream, behavior: Behavior, units: Sequence[UnitId], formats: Sequence[str], *, group_size: int = 64,
    advance: Advance = ignore,
) -> dict[str, Scores]:  # fmt: skip
    """By format name, metric(unit rounded) - metric(clean) of each unit alone. Raises as `round_sets`."""
    before, after = round_sets(
        stream, behavior, {str(unit): (unit,) for unit in units}, formats, group_size=group_size, advance=advance
    )
    effects = {name: torch.stack([changed[str(unit)] for unit in units]) - before for name, changed in after.items()}
    return {
        name: to_scores(f"rounding-{name}", "causal", behavior, units, effect, format=name, group_size=group_size)
        for name, effect in effects.items()
    }


def round_sets(
    stream: Stream, behavior: Behavior, sets: Mapping[str, Sequence[UnitId]], formats: Sequence[str], *,
    group_size: int = 64, advance: Advance = ignore,
) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:  # fmt: skip
    """The metric [n] of the model, and by format and set that with the weights of a whole set rounded together.

    Single neurons are columns of width one, on which every grid is nearly exact: round them in sets. CheckpointError
    for a packed model; ValueError for units that do not exist.
    """
    require_weights(stream)
    full = {name: resolve(name, group_size=group_size, dtype=stream.dtype) for name in formats}

    def edits(index: int, module: nn.Module, inputs: Inputs) -> Mapping[str, Edit]:
        place = stream.anatomy.blocks[index]
        mine = {name: chosen for name, units in sets.items() if (chosen := [u for u in units if u.layer == index])}
        if not mine:
            return {}
        hessians = _hessians(stream, behavior, module, place, inputs)
        found: dict[str, Edit] = {}
        for name, units in mine.items():
            changed = _rounded(module, place, units, hessians, full)
            for form, weights in changed.items():
                found[f"{form}/{name}"] = _edit(module, place, weights)
        return found

    before, after = measure_edits(stream, behavior, edits, advance=advance)
    return before, {form: {name: after[f"{form}/{name}"] for name in sets} for form in formats}


def require_weights(stream: Stream) -> None:
    """CheckpointError if the model's weights are rounded already, so that scores of weights mean nothing."""
    folder = stream.anatomy.folder
    if method := read_headers(folder, packed_ok=True).rounded_by:
        raise CheckpointError(
            f"{folder}: its weights are rounded already ({method}), and have no price any more",
            hint="score the original checkpoint; scores of activations work on both",
        )


def _hessians(stream: Stream, behavior: Behavior, module: nn.Module, place: Block, inputs: Inputs) -> dict[str, Tensor]:
    """Role -> second moment [cols, cols] of a matrix's inputs over the prompts of the clean run."""
    names = {matrix.role: place.local(matrix) for matrix in place.matrices}
    totals = {matrix.role: torch.zeros(matrix.cols, matrix.cols, device=stream.device) for matrix in place.matrices}
    masks = stream.batches(mask_of(behavior))
    for b, mask in enumerate(masks):
        with torch.no_grad(), capture(module, list(names.values())) as seen:
            stream.run(place.index, module, inputs("clean", b))
        for role, name in names.items():
            x = seen[name].input
            assert x is not None
            add_second_moment(totals[role], x.flatten(0, -2), mask.flatten().to(x.device).float())
    return {role: total / sum(float(mask.sum()) for mask in masks) for role, total in totals.items()}


def _rounded(
    module: nn.Module, place: Block, units: Sequence[UnitId], hessians: Mapping[str, Tensor], formats: Mapping[str, str]
) -> dict[str, dict[str, Tensor]]:
    """Format -> local module name -> its weights [rows, cols] with those of `units` rounded."""
    changed: dict[str, dict[str, Tensor]] = {name: {} for name in formats}
    for role, (axis, indices) in unit_weights(place, units).items():
        matrix = place.role(role)
        weight, at = weight_of(module, place, matrix).float(), torch.tensor(indices, device=hessians[role].device)
        rows = axis == "rows"
        part, hessian = (weight[at], hessians[role]) if rows else (weight[:, at], hessians[role][at][:, at])
        results, _ = quantize_everywhere(part, hessian, list(dict.fromkeys(formats.values())))
        for name, full in formats.items():
            new = weight.clone()
            if rows:
                new[at] = results[full].decode()
            else:
                new[:, at] = results[full].decode()
            changed[name][place.local(matrix)] = new
    return changed


def _edit(module: nn.Module, place: Block, weights: Mapping[str, Tensor]) -> Edit:
    def edit(b: int) -> AbstractContextManager[None]:  # noqa: ARG001 (weights are the same for all prompts)
        return replace(module, weights, transposed=place.matrices[0].transposed)

    return edit
