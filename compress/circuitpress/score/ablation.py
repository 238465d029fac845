"""Exact ablation: what the model loses, in nats, when a unit is closed. Evidence: causal.

`zero` replaces the unit's activation by zero, `mean` by its mean over the text, `resample` by its value at a random
other token of the text (the least unnatural of the three: the value is one that occurs). Closing a unit is not what a
compressor does to it: use the result to judge estimates and to choose what to protect.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..console import Advance, ignore
from ..hooks import capture, gate, unit_columns
from ..stream import Stream
from ..units import Scores, UnitId
from .variants import Edit, measure

Mode = Literal["zero", "mean", "resample"]


def ablate(
    stream: Stream,
    windows: Tensor,
    units: Sequence[UnitId],
    *,
    mode: Mode = "mean",
    seed: int = 0,
    advance: Advance = ignore,
) -> Scores:
    """KL(original || ablated) for each unit on `windows` int64 [n, length], in nats per predicted token.

    Heads and key-value groups are closed at the input of `o`, neurons at the input of `down`. ValueError for a unit
    that does not exist.
    """
    by_layer: dict[int, list[UnitId]] = {}
    for unit in units:
        if not 0 <= unit.layer < stream.depth:
            raise ValueError(f"{unit} does not exist: the model has layers 0 to {stream.depth - 1}")
        by_layer.setdefault(unit.layer, []).append(unit)
    count = len(stream.batches(windows))

    def edits(index: int, module: nn.Module, inputs: Callable[[int], Tensor]) -> Mapping[str, Edit]:
        place = stream.anatomy.blocks[index]
        chosen = [(unit, *unit_columns(place, unit.kind, unit.index)) for unit in by_layer.get(index, [])]
        result: dict[str, Edit] = {}
        for role in sorted({role for _, role, _ in chosen}):
            name = place.local(place.role(role))
            values = _values(stream, index, module, name, inputs, count) if mode != "zero" else None
            for unit, _, columns in (entry for entry in chosen if entry[1] == role):
                result[str(unit)] = _edit(module, name, columns, mode, values, seed)
        return result

    # The windows are also the context, so that means and resampled values come from the same text.
    measured = measure(stream, windows, edits, context=windows if mode != "zero" else None, advance=advance)
    rows = [measured[str(unit)] for unit in units]
    values, stderr = (np.array([getattr(row, name) for row in rows]) for name in ("kl", "kl_stderr"))
    return Scores(
        f"{mode}-ablation", "causal", tuple(units), values, stderr, {"seed": seed, "windows": windows.shape[0]}
    )


def _values(
    stream: Stream, index: int, module: nn.Module, name: str, inputs: Callable[[int], Tensor], count: int
) -> Tensor:
    """The activations [tokens, cols] that enter matrix `name` over all context batches."""
    seen = []
    for b in range(count):
        with capture(module, [name]) as captured:
            stream.run(index, module, inputs(b))
        x = captured[name].input
        assert x is not None
        seen.append(x.flatten(0, -2))
    return torch.cat(seen)


def _edit(module: nn.Module, name: str, columns: slice, mode: Mode, values: Tensor | None, seed: int) -> Edit:
    def rewrite(x: Tensor) -> Tensor:
        x = x.clone()
        if values is None:
            x[..., columns] = 0
        elif mode == "mean":
            x[..., columns] = values[:, columns].mean(0)
        else:
            # One generator per call: every micro-batch of every variant draws the same tokens.
            generator = torch.Generator().manual_seed(seed)
            draw = torch.randint(values.shape[0], x.shape[:-1], generator=generator).to(values.device)
            x[..., columns] = values[draw][..., columns]
        return x

    return lambda: gate(module, name, rewrite)
