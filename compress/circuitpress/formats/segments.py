"""Several segments of one matrix, laid end to end in a few flat tensors: how a packed module is stored.

A module's descriptor holds the matrix's shape, the axis along which it is cut, and for every segment its format and
its `start` and `stop`. The parts of all segments under one tensor name follow each other in the order of the
descriptor; their lengths come from the formats' layouts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Format


def segment_shape(shape: Sequence[int], axis: str, start: int, stop: int) -> tuple[int, int]:
    """Rows and columns of one segment of a matrix of `shape`."""
    return (stop - start, shape[1]) if axis == "rows" else (shape[0], stop - start)


def pack_segments(parts: Sequence[tuple[Format, Any]]) -> dict[str, Tensor]:
    """The flat tensors of a module from (format, quantized value) of each segment in order."""
    flat: dict[str, list[Tensor]] = {}
    for form, value in parts:
        for name, tensor in form.pack(value).items():
            flat.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in flat.items()}


def split_segments(
    tensors: Mapping[str, Tensor], shape: Sequence[int], parts: Sequence[tuple[Format, int, int]], axis: str
) -> list[Any]:
    """The quantized values of all segments: the inverse of `pack_segments`; `parts` holds (format, start, stop)."""
    offset = dict.fromkeys(tensors, 0)
    values = []
    for form, start, stop in parts:
        rows, cols = segment_shape(shape, axis, start, stop)
        piece = {}
        for name, (_, count) in form.layout(rows, cols).items():
            piece[name] = tensors[name][offset[name] : offset[name] + count]
            offset[name] += count
        values.append(form.unpack(piece, rows, cols))
    return values
