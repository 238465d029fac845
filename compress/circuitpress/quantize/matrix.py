"""One matrix, several formats: along its rows, along its columns, or all formats of a menu at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..formats import CastFormat, Format, IntCodes, IntFormat, parse
from ..units import Axis
from .feedback import gptq


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix: one (format, start, stop, value) for each segment, and notes on fallbacks."""

    shape: tuple[int, int]
    axis: Axis
    parts: tuple[tuple[Format, int, int, Any], ...]
    fallback: str = ""

    def decode(self) -> Tensor:
        """The weights that the model will compute with, float32 [rows, cols]."""
        return torch.cat([form.decode(value) for form, _, _, value in self.parts], 0 if self.axis == "rows" else 1)


def group_bounds(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Groups of `size` columns from `start` to `stop`; the last may be shorter."""
    return [(at, min(at + size, stop)) for at in range(start, stop, size)]


def quantize_everywhere(weight: Tensor, hessian: Tensor, formats: Sequence[str]) -> tuple[dict[str, Quantized], str]:
    """Rounds the whole matrix to each format; returns the results by name and a note on fallbacks.

    Integer formats of one group size share a single GPTQ pass: they only differ in their rows' largest code.
    """
    shape = (weight.shape[0], weight.shape[1])
    result: dict[str, Quantized] = {}
    notes = []
    parsed = {name: parse(name) for name in formats}
    for size in sorted({form.group_size for form in parsed.values() if isinstance(form, IntFormat)}):
        menu = {n: form for n, form in parsed.items() if isinstance(form, IntFormat) and form.group_size == size}
        bounds = group_bounds(0, shape[1], size)
        maxq = torch.tensor([2**form.bits - 1 for form in menu.values()], device=weight.device)
        maxq = maxq.repeat_interleave(shape[0])[:, None].expand(-1, len(bounds))
        stacked = weight.repeat(len(menu), 1) if len(menu) > 1 else weight
        rounding = gptq(stacked, hessian, bounds, maxq)
        notes.append(rounding.fallback)
        for i, (name, form) in enumerate(menu.items()):
            rows = slice(i * shape[0], (i + 1) * shape[0])
            value = IntCodes(rounding.codes[rows], rounding.scales[rows], rounding.zeros[rows])
            result[name] = Quantized(shape, "rows", ((form, 0, shape[0], value),), rounding.fallback)
    for name, form in parsed.items():
        if isinstance(form, CastFormat):
            result[name] = Quantized(shape, "rows", ((form, 0, shape[0], weight.to(form.dtype)),))
    return result, "; ".join(sorted({note for note in notes if note}))


def quantize_matrix(weight: Tensor, hessian: Tensor, axis: Axis, segments: Sequence[tuple[str, int, int]]) -> Quantized:
    """Rounds each segment (format name, start, stop) of a matrix float32 [rows, cols] to its format.

    Rows do not influence each other, so segments of rows are rounded on their own; segments of columns share one GPTQ
    pass in which every segment's columns feed their error to the others.
    """
    parts = [(parse(name), start, stop) for name, start, stop in segments]
    if axis == "rows":
        return _by_rows(weight, hessian, parts)
    return _by_columns(weight, hessian, parts)


def _by_rows(weight: Tensor, hessian: Tensor, parts: Sequence[tuple[Format, int, int]]) -> Quantized:
    rows, cols = weight.shape
    values: dict[int, Any] = {}
    fallback = ""
    for i, (form, start, stop) in enumerate(parts):
        if isinstance(form, CastFormat):
            values[i] = weight[start:stop].to(form.dtype)
    for size in sorted({form.group_size for form, _, _ in parts if isinstance(form, IntFormat)}):
        bounds = group_bounds(0, cols, size)
        chosen = [i for i, (form, _, _) in enumerate(parts) if isinstance(form, IntFormat) and form.group_size == size]
        index = torch.cat([torch.arange(parts[i][1], parts[i][2]) for i in chosen])
        levels = torch.cat([torch.full((parts[i][2] - parts[i][1],), _maxq(parts[i][0])) for i in chosen])
        rounding = gptq(weight[index], hessian, bounds, levels[:, None].expand(-1, len(bounds)).to(weight.device))
        fallback = fallback or rounding.fallback
        at = 0
        for i in chosen:
            span = slice(at, at + parts[i][2] - parts[i][1])
            values[i] = IntCodes(rounding.codes[span], rounding.scales[span], rounding.zeros[span])
            at = span.stop
    joined = tuple((form, start, stop, values[i]) for i, (form, start, stop) in enumerate(parts))
    return Quantized((rows, cols), "rows", joined, fallback)


def _by_columns(weight: Tensor, hessian: Tensor, parts: Sequence[tuple[Format, int, int]]) -> Quantized:
    rows, cols = weight.shape
    bounds: list[tuple[int, int]] = []
    levels: list[int] = []
    spans = []
    for form, start, stop in parts:
        groups = group_bounds(start, stop, form.group_size if isinstance(form, IntFormat) else stop - start)
        spans.append(slice(len(bounds), len(bounds) + len(groups)))
        bounds += groups
        levels += [_maxq(form)] * len(groups)
    maxq = torch.tensor(levels, device=weight.device)[None].expand(rows, -1)
    rounding = gptq(weight, hessian, bounds, maxq)
    joined = []
    for (form, start, stop), span in zip(parts, spans, strict=True):
        if isinstance(form, CastFormat):
            value: Any = weight[:, start:stop].to(form.dtype)
        else:
            value = IntCodes(rounding.codes[:, start:stop], rounding.scales[:, span], rounding.zeros[:, span])
        joined.append((form, start, stop, value))
    return Quantized((rows, cols), "cols", tuple(joined), rounding.fallback)


def _maxq(form: Format) -> int:
    return 2**form.bits - 1 if isinstance(form, IntFormat) else 0
