"""Storage formats: one file a format, one row a format in the table below.

A name in a recipe may be short (`int4`, `dense`); `resolve` completes it with the recipe's group size and the
checkpoint's own type, and only complete names (`int4g64`, `bfloat16`) appear in plans and checkpoints.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Format
from .cast import CastFormat
from .integer import IntCodes, IntFormat
from .segments import pack_segments, segment_shape, split_segments

__all__ = [
    "CastFormat",
    "Format",
    "IntCodes",
    "IntFormat",
    "decode_segments",
    "pack_segments",
    "parse",
    "resolve",
    "segment_shape",
    "split_segments",
]

_TABLE = (
    (re.compile(r"int([2-8])g([1-9]\d*)"), lambda bits, group: IntFormat(int(bits), int(group))),
    (re.compile(r"(float32|float16|bfloat16)"), lambda dtype: CastFormat(getattr(torch, dtype))),
)


def parse(name: str) -> Format:
    """The format of a complete name; ValueError says which names there are."""
    for pattern, build in _TABLE:
        if match := pattern.fullmatch(name):
            return build(*match.groups())
    raise ValueError(
        f"{name!r} is not a format: there are int2 to int8 (int4g32 sets the group), float16, bfloat16, float32, dense"
    )


def resolve(name: str, *, group_size: int, dtype: torch.dtype) -> str:
    """The complete name: `int4` takes the recipe's group size, `dense` the checkpoint's own type."""
    if re.fullmatch(r"int[2-8]", name):
        name = f"{name}g{group_size}"
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
