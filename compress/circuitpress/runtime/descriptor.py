"""What config.json says about one packed matrix, and how its flat tensors are cut into parts.

A matrix is a list of parts along one axis, each in one format; the part's own tensors follow one another in
`<module>.weight`, `.scales`, `.zeros`, `.dense` and whatever else its formats name. Shapes and lengths follow from the
descriptor alone, so the module is built before any weight is read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..formats import CastFormat, Format, IntFormat, parse
from ..units import Axis

_STRIPE = 1 << 20
"""Weights that are unpacked at once: the temporary int64 codes of a stripe then take 8 MiB."""
_ROW_STEP = 64
"""Rows in a stripe are a multiple of this: then a stripe ends on a whole byte in every number of bits."""


@dataclass(frozen=True)
class Part:
    """A run of rows or columns, `start` to `stop`, stored in one format; `rows` x `cols` is the part's own shape."""

    format: Format
    start: int
    stop: int
    rows: int
    cols: int


@dataclass(frozen=True)
class Block:
    """Some rows of a part: where they lie in the matrix and their quantized value (codes, or a dense tensor)."""

    format: Format
    rows: slice
    cols: slice
    value: Any


@dataclass(frozen=True)
class Descriptor:
    """One packed matrix: `rows` outputs, `cols` inputs, and its parts along `axis`, in order and without a gap."""

    rows: int
    cols: int
    axis: Axis
    parts: tuple[Part, ...]

    @classmethod
    def from_json(cls, module: str, entry: Mapping[str, Any]) -> Self:
        """Reads `quantization_config.modules[module]`; CheckpointError says what is wrong with which module."""
        hint = "write the model again with `circuitpress apply`, or download it again"
        try:
            rows, cols = entry["shape"]
            axis = entry["axis"]
            if axis not in ("rows", "cols"):
                raise ValueError(f"axis is {axis!r}, expected 'rows' or 'cols'")
            parts = tuple(_part(rows, cols, axis, segment) for segment in entry["segments"])
            ends = (0, *(part.stop for part in parts))
            starts = (*(part.start for part in parts), rows if axis == "rows" else cols)
            if ends != starts:
                spans = f"segments start at {starts[:-1]} and stop at {ends[1:]}"
                raise ValueError(f"{spans}: they must fill 0:{starts[-1]}")
            descriptor = cls(rows, cols, axis, parts)
            if "weight" not in descriptor.layout():
                raise ValueError("no segment is packed, and a matrix kept whole is not listed but stored as it was")
        except (KeyError, TypeError, ValueError) as error:
            cause = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            message = f"quantization_config of {module} in config.json is damaged: {cause}"
            raise CheckpointError(message, hint=hint) from error
        return descriptor

    def layout(self) -> dict[str, tuple[torch.dtype, int]]:
        """The module's flat tensors: name -> (dtype, number of elements). ValueError if parts disagree on a type."""
        total: dict[str, tuple[torch.dtype, int]] = {}
        for part in self.parts:
            for name, (dtype, count) in part.format.layout(part.rows, part.cols).items():
                known, before = total.get(name, (dtype, 0))
                if known != dtype:
                    raise ValueError(f"segments store {name!r} as {known} and as {dtype}")
                total[name] = (dtype, before + count)
        return total

    def blocks(self, tensors: Mapping[str, Tensor]) -> Iterator[Block]:
        """Unpacks the flat tensors of `layout`, about a million weights at a time, so that little memory is in use."""
        offsets = dict.fromkeys(tensors, 0)
        for part in self.parts:
            own: dict[str, Tensor] = {}
            for name, (_, count) in part.format.layout(part.rows, part.cols).items():
                own[name] = tensors[name][offsets[name] : offsets[name] + count]
                offsets[name] += count
            for first, last in _stripes(part):
                value = part.format.unpack(_rows(part, own, first, last), last - first, part.cols)
                along, across = slice(first, last), slice(0, part.cols)
                if self.axis == "rows":
                    along = slice(part.start + first, part.start + last)
                else:
                    across = slice(part.start, part.stop)
                yield Block(part.format, along, across, value)

    def decode(self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense matrix [rows, cols] in `dtype`, on the device of the tensors."""
        device = next(iter(tensors.values())).device
        matrix = torch.empty(self.rows, self.cols, dtype=dtype, device=device)
        for block in self.blocks(tensors):
            matrix[block.rows, block.cols] = block.format.decode(block.value).to(dtype)
        return matrix


def _part(rows: int, cols: int, axis: Axis, segment: Mapping[str, Any]) -> Part:
    start, stop = segment["start"], segment["stop"]
    if not start < stop:
        raise ValueError(f"a segment runs from {start} to {stop}")
    own_rows, own_cols = (stop - start, cols) if axis == "rows" else (rows, stop - start)
    return Part(parse(segment["format"]), start, stop, own_rows, own_cols)


def _stripes(part: Part) -> Iterator[tuple[int, int]]:
    if not isinstance(part.format, IntFormat | CastFormat):  # only these are known to be stored row after row
        yield 0, part.rows
        return
    step = max(_ROW_STEP, _STRIPE // part.cols // _ROW_STEP * _ROW_STEP)
    for first in range(0, part.rows, step):
        yield first, min(first + step, part.rows)


def _rows(part: Part, tensors: Mapping[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    if (first, last) == (0, part.rows):
        return dict(tensors)
    begin, end = part.format.layout(first, part.cols), part.format.layout(last, part.cols)
    return {name: tensor[begin[name][1] : end[name][1]] for name, tensor in tensors.items()}
