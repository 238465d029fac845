"""One matrix, several formats: along its rows, along its columns, or all formats of a menu at once.

Integer formats of one group size and kind share a GPTQ pass, since rows do not influence each other. Every other format
rounds its segment by itself. Segments of columns do influence each other: integers of one kind share one pass; where
other formats take part the segments are rounded one after the other, each against what the later ones can make up for:

    H' = H_aa - H_ab H_bb^-1 H_ba       W_b <- W_b - E_a H_ab H_bb^-1        a: this segment, b: all later ones

which is GPTQ with whole segments for columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..formats import (
    AbsmaxFormat,
    CastFormat,
    CodebookFormat,
    Format,
    IntCodes,
    IntFormat,
    OutlierFormat,
    TrellisFormat,
    parse,
)
from ..units import Axis
from .absmax import round_absmax
from .codebook import round_codebook
from .draft import draft_trellis
from .feedback import DAMPING, Rounding, gptq
from .grid import scale_tops
from .outliers import round_with_outliers
from .trellis import round_trellis


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


def quantize_everywhere(
    weight: Tensor, hessian: Tensor, formats: Sequence[str], *, polish: bool = False, draft: bool = False
) -> tuple[dict[str, Quantized], str]:
    """Rounds the whole matrix to each format; returns the results by name and a note on fallbacks.

    Prices are made without `polish`: it is the same relief for all formats, and would double the time. They are made of
    drafts too: with `draft`, trellis formats come back as floating-point weights with the error of encoded ones.
    """
    rows, cols = weight.shape
    parsed = {name: parse(name) for name in formats}
    drafted = {name: form for name, form in parsed.items() if draft and isinstance(form, TrellisFormat)}
    rounded = {name: form for name, form in parsed.items() if name not in drafted}
    values = _round_rows(weight, hessian, [(form, 0, rows) for form in rounded.values()], polish=polish)
    result = {
        name: Quantized((rows, cols), "rows", ((form, 0, rows, value),), note)
        for (name, form), (value, note) in zip(rounded.items(), values, strict=True)
    }
    notes = [note for _, note in values]
    if drafted:
        drafts, note = draft_trellis(weight, hessian, list(drafted.values()))
        whole = CastFormat(torch.float32)
        result |= {
            name: Quantized((rows, cols), "rows", ((whole, 0, rows, value),), note)
            for name, value in zip(drafted, drafts, strict=True)
        }
        notes.append(note)
    return {name: result[name] for name in parsed}, _joined(notes)


def quantize_matrix(
    weight: Tensor, hessian: Tensor, axis: Axis, segments: Sequence[tuple[str, int, int]], *, polish: bool = True
) -> Quantized:
    """Rounds each segment (format name, start, stop) of a matrix float32 [rows, cols] to its format.

    `polish` improves codes and scales after rounding (see `quantize/polish.py`).
    """
    parts = [(parse(name), start, stop) for name, start, stop in segments]
    if axis == "rows":
        values = _round_rows(weight, hessian, parts, polish=polish)
    elif all(isinstance(form, IntFormat | CastFormat) for form, _, _ in parts) and len(_kinds(parts)) < 2:
        values = _round_int_columns(weight, hessian, parts, polish=polish)
    else:
        values = _round_columns_in_turn(weight, hessian, parts, polish=polish)
    joined = tuple((*part, value) for part, (value, _) in zip(parts, values, strict=True))
    return Quantized((weight.shape[0], weight.shape[1]), axis, joined, _joined(note for _, note in values))


_Part = tuple[Format, int, int]
_Value = tuple[Any, str]
"""The value that a format stores, and the note on fallbacks."""


def _round_rows(weight: Tensor, hessian: Tensor, parts: Sequence[_Part], *, polish: bool) -> list[_Value]:
    """Rounds segments of rows, which may overlap."""
    found: dict[int, _Value] = {}
    passes = {(form.group_size, form.symmetric) for form, _, _ in parts if isinstance(form, IntFormat)}
    for one in sorted(passes):
        index = [
            i
            for i, (form, _, _) in enumerate(parts)
            if isinstance(form, IntFormat) and (form.group_size, form.symmetric) == one
        ]
        values = _round_int_rows(weight, hessian, [parts[i] for i in index], polish=polish)
        found |= dict(zip(index, values, strict=True))
    trellises = [i for i, (form, _, _) in enumerate(parts) if isinstance(form, TrellisFormat)]
    for span in dict.fromkeys(parts[i][1:] for i in trellises):
        index = [i for i in trellises if parts[i][1:] == span]
        forms = [form for i in index if isinstance(form := parts[i][0], TrellisFormat)]
        values, note = round_trellis(weight[slice(*span)], hessian, forms)
        found |= {i: (value, note) for i, value in zip(index, values, strict=True)}
    for i, (form, start, stop) in enumerate(parts):
        piece = weight[start:stop]
        if isinstance(form, CastFormat):
            found[i] = piece.to(form.dtype), ""
        elif isinstance(form, CodebookFormat):
            found[i] = round_codebook(piece, hessian, form, polished=polish)
        elif isinstance(form, AbsmaxFormat):
            found[i] = round_absmax(piece, hessian, form, polished=polish)
        elif isinstance(form, OutlierFormat):
            found[i] = round_with_outliers(piece, hessian, form, polished=polish)
    return [found[i] for i in range(len(parts))]


def _round_int_rows(weight: Tensor, hessian: Tensor, parts: Sequence[_Part], *, polish: bool) -> list[_Value]:
    """Segments of rows in integer formats of one group size, all symmetric or none: one pass over their rows."""
    forms = [form for form, _, _ in parts if isinstance(form, IntFormat)]
    bounds = group_bounds(0, weight.shape[1], forms[0].width(weight.shape[1]))
    pieces = [weight[start:stop] for _, start, stop in parts]
    ends = torch.tensor([0, *(len(piece) for piece in pieces)]).cumsum(0).tolist()
    maxq = torch.cat([torch.full((len(piece), 1), _maxq(form)) for form, piece in zip(forms, pieces, strict=True)])
    tops = None
    if any(form.scale_bits != 16 for form in forms):
        tops = torch.cat([_tops(piece, bounds, form) for form, piece in zip(forms, pieces, strict=True)])
        tops = tops.expand(-1, len(bounds))
    stacked = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    maxq = maxq.expand(-1, len(bounds)).to(weight.device)
    rounding = gptq(stacked, hessian, bounds, maxq, tops=tops, polished=polish, symmetric=forms[0].symmetric)
    return [
        (_int_codes(rounding, slice(a, b), slice(None), slice(None)), rounding.fallback)
        for a, b in zip(ends, ends[1:], strict=False)
    ]


def _round_int_columns(weight: Tensor, hessian: Tensor, parts: Sequence[_Part], *, polish: bool) -> list[_Value]:
    """Segments of columns in integer and floating-point formats: one pass, in which each feeds its error to others."""
    rows = weight.shape[0]
    bounds: list[tuple[int, int]] = []
    spans, levels, tops = [], [], []
    for form, start, stop in parts:
        size = form.width(stop - start) if isinstance(form, IntFormat) else stop - start
        groups = group_bounds(start, stop, size)
        spans.append(slice(len(bounds), len(bounds) + len(groups)))
        levels += [_maxq(form)] * len(groups)
        tops.append(_tops(weight, groups, form).expand(-1, len(groups)))
        bounds += groups
    maxq = torch.tensor(levels, device=weight.device)[None].expand(rows, -1)
    short = any(isinstance(form, IntFormat) and form.scale_bits != 16 for form, _, _ in parts)
    rounding = gptq(
        weight, hessian, bounds, maxq, tops=torch.cat(tops, 1) if short else None, polished=polish,
        symmetric=True in _kinds(parts),
    )  # fmt: skip
    return [
        (weight[:, start:stop].to(form.dtype), "")
        if isinstance(form, CastFormat)
        else (_int_codes(rounding, slice(None), slice(start, stop), span), rounding.fallback)
        for (form, start, stop), span in zip(parts, spans, strict=True)
    ]


def _round_columns_in_turn(weight: Tensor, hessian: Tensor, parts: Sequence[_Part], *, polish: bool) -> list[_Value]:
    """Segments of columns in any formats, one after the other."""
    damped = hessian.float().clone()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    work = weight.float().clone()
    result: list[_Value] = []
    for k, (form, start, stop) in enumerate(parts):
        here, later = slice(start, stop), slice(stop, parts[-1][2])
        share = None
        own = hessian[here, here]
        if k + 1 < len(parts):
            factor, info = torch.linalg.cholesky_ex(damped[later, later])
            if not int(info) and bool(factor.isfinite().all()):
                share = torch.cholesky_solve(damped[later, here], factor)
                own = own - damped[here, later] @ share
        own = (own + own.T) / 2
        # A floating-point segment stays as it was: what earlier segments would have it make up for is lost.
        source = weight if isinstance(form, CastFormat) else work
        ((value, note),) = _round_rows(source[:, here], own, [(form, 0, len(weight))], polish=polish)
        result.append((value, note))
        if share is not None:
            work[:, later] -= (form.decode(value) - source[:, here]) @ share.T
    return result


def _int_codes(rounding: Rounding, rows: slice, cols: slice, groups: slice) -> IntCodes:
    return IntCodes(rounding.codes[rows, cols], rounding.scales[rows, groups], rounding.zeros[rows, groups])


def _kinds(parts: Sequence[_Part]) -> set[bool]:
    """Whether the integer formats among the parts are symmetric."""
    return {form.symmetric for form, _, _ in parts if isinstance(form, IntFormat)}


def _maxq(form: Format) -> int:
    return 2**form.bits - 1 if isinstance(form, IntFormat) else 0


def _tops(weight: Tensor, bounds: Sequence[tuple[int, int]], form: Format) -> Tensor:
    """Shared exponents [rows, 1] of a segment's scales, infinite where they are float16."""
    if isinstance(form, IntFormat) and form.scale_bits != 16:
        return scale_tops(weight, bounds, form.bits)
    return torch.full((len(weight), 1), torch.inf, device=weight.device)


def _joined(notes: Any) -> str:
    return "; ".join(sorted({note for note in notes if note}))
