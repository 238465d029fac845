"""Storage formats: one file a format, one row a format in the table below.

A name in a recipe may be short (`int4`, `dense`); `resolve` completes it with the recipe's group size and the
checkpoint's own type, and only complete names (`int4g64`, `bfloat16`) appear in plans and checkpoints.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .absmax import AbsmaxCodes, AbsmaxFormat
from .base import Format
from .cast import CastFormat
from .codebook import BookCodes, CodebookFormat
from .integer import IntCodes, IntFormat
from .outliers import OutlierCodes, OutlierFormat
from .segments import pack_segments, segment_shape, split_segments
from .trellis import TrellisCodes, TrellisFormat, default_memory

__all__ = [
    "AbsmaxCodes",
    "AbsmaxFormat",
    "BookCodes",
    "CastFormat",
    "CodebookFormat",
    "Format",
    "IntCodes",
    "IntFormat",
    "OutlierCodes",
    "OutlierFormat",
    "TrellisCodes",
    "TrellisFormat",
    "decode_segments",
    "pack_segments",
    "parse",
    "resolve",
    "segment_shape",
    "split_segments",
]

_INT = r"int([2-8])g([1-9]\d*)(?:s(6))?"
_SHARE = r"(0\.(?:5|[1-4][1-9]?|0[1-9]))%"
_TABLE = (
    (re.compile(_INT), lambda *found: _int(*found)),
    (
        re.compile(r"sym([2-8])(?:g([1-9]\d*)|c)"),
        lambda bits, group: IntFormat(int(bits), int(group or 0), symmetric=True),
    ),
    (re.compile(rf"{_INT}\+{_SHARE}"), lambda *found: OutlierFormat(_int(*found[:3]), float(found[3]))),
    (re.compile(r"code([2-4])(?:(?:r([1-9]\d*))?g([1-9]\d*))?"), lambda *found: _codebook(*found)),
    (re.compile(r"trellis(1\.5|2|2\.5|3|3\.5|4)(?:l(1[0-6]))?"), lambda bits, memory: _trellis(bits, memory)),
    (re.compile(r"nf4"), lambda: AbsmaxFormat(4, 64)),
    (re.compile(r"llmint8"), lambda: AbsmaxFormat(8, 0)),
    (re.compile(r"(float32|float16|bfloat16)"), lambda dtype: CastFormat(getattr(torch, dtype))),
)


def parse(name: str) -> Format:
    """The format of a complete name; ValueError says which names there are."""
    for pattern, build in _TABLE:
        if match := pattern.fullmatch(name):
            return build(*match.groups())
    raise ValueError(
        f"{name!r} is not a format: there are int2 to int8 (int4g32 sets the group, int4s6 takes scales in 6 bits, "
        "int4+0.5% keeps outliers), sym2 to sym8 (sym4g32, sym8c), code2 to code4 (code3g64, code3r16g64), trellis1.5 "
        "to trellis4 by halves, nf4, llmint8, float16, bfloat16, float32, dense"
    )


def _int(bits: str, group: str, scale_bits: str | None) -> IntFormat:
    return IntFormat(int(bits), int(group), int(scale_bits or 16))


def _codebook(bits: str, share: str | None, group: str | None) -> CodebookFormat:
    return CodebookFormat(int(bits), int(share or 0), int(group)) if group else CodebookFormat(int(bits))


def _trellis(bits: str, memory: str | None) -> TrellisFormat:
    half_bits = round(2 * float(bits))
    return TrellisFormat(half_bits, int(memory) if memory else default_memory(half_bits))


def resolve(name: str, *, group_size: int, dtype: torch.dtype) -> str:
    """The complete name: `int4` takes the recipe's group size, `dense` the checkpoint's own type."""
    if match := re.fullmatch(r"((?:int|sym)[2-8])((s6)?(\+.*)?)", name):
        name = f"{match[1]}g{group_size}{match[2]}"
    elif name == "dense":
        name = str(dtype).removeprefix("torch.")
    return parse(name).name


def decode_segments(
    tensors: Mapping[str, Tensor], shape: Sequence[int], axis: str, segments: Sequence[Mapping[str, Any]]
) -> Tensor:
    """The weights of a packed module, float32 [rows, cols], from its flat tensors and its descriptor's entries."""
    parts = [(parse(entry["format"]), entry["start"], entry["stop"]) for entry in segments]
    values = split_segments(tensors, shape, parts, axis)
    return torch.cat(
        [form.decode(value) for (form, _, _), value in zip(parts, values, strict=True)], 0 if axis == "rows" else 1
    )
