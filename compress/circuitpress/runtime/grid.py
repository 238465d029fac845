"""One grid for a whole matrix, whatever its parts: what torch's int4 operator on a CPU takes, once or twice.

Codes of 2 and 3 bits fit into 4 bits as they are; parts may differ in bits as long as they share one group size and
their groups line up with the matrix's. Codes of 5 to 8 bits are two planes of 4: with m = 2^(bits - 1) in the middle,

    (code - zero) * s  =  (code // 16 - m / 16) * 16 s  +  (code % 16 - (zero - m)) * s

The upper plane needs no offset, and that of the lower one is small, since zeros lie around m. It is exact as the 4-bit
form is: but for the rounding of scales and offsets to bfloat16. Only the rows or columns of such parts have an upper
plane. torch's int8 operator would take one scale a row, and so new rounding.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats import IntCodes, IntFormat
from .descriptor import Descriptor


class Grid(NamedTuple):
    """A matrix as a plane of 4-bit codes, and another one for some of its rows or columns."""

    lower: IntCodes
    """codes uint8 [rows, cols] below 16; scales [rows, groups] and zeros, which may be negative"""
    upper: IntCodes | None
    """The same of the rows (or columns) `where`"""
    where: Tensor
    """int64: rows or columns that have an upper plane"""


def shared_group_size(descriptor: Descriptor) -> int | None:
    """The group size that all parts share, None if a part is no grid of integers or groups do not line up."""
    formats = [part.format for part in descriptor.parts]
    sizes = {entry.group_size if isinstance(entry, IntFormat) else None for entry in formats}
    size = sizes.pop()
    if sizes or size is None:
        return None
    if descriptor.axis == "cols" and any(part.start % size for part in descriptor.parts):
        return None
    return size


def to_grid(descriptor: Descriptor, tensors: Mapping[str, Tensor], group_size: int) -> Grid:
    """The planes of a matrix whose parts share a group size."""
    device = next(iter(tensors.values())).device
    rows, cols = descriptor.rows, descriptor.cols
    groups = -(-cols // group_size)
    codes = torch.empty(rows, cols, dtype=torch.uint8, device=device)
    scales = torch.empty(rows, groups, dtype=torch.float16, device=device)
    zeros = torch.empty(rows, groups, dtype=torch.int16, device=device)
    wide = {
        part.start: form.bits
        for part in descriptor.parts
        if isinstance(form := part.format, IntFormat) and form.bits > 4
    }
    along = 0 if descriptor.axis == "rows" else 1
    spans = [torch.arange(part.start, part.stop) for part in descriptor.parts if part.start in wide]
    where = torch.cat(spans or [torch.zeros(0, dtype=torch.long)])
    middle = torch.zeros((rows, cols)[along], dtype=torch.int16)
    for part in descriptor.parts:
        middle[part.start : part.stop] = 2 ** (wide[part.start] - 1) if part.start in wide else 0
    for block in descriptor.blocks(tensors):
        first = block.cols.start // group_size
        span = slice(first, first + block.value.scales.shape[1])
        codes[block.rows, block.cols] = block.value.codes
        scales[block.rows, span] = block.value.scales
        zeros[block.rows, span] = block.value.zeros.short()
    zeros -= middle[:, None] if along == 0 else middle[::group_size]
    upper = None
    if spans:
        chosen = codes.index_select(along, where) >> 4
        offset = 8 - middle[where] // 16
        chosen = (chosen.short() + (offset[:, None] if along == 0 else offset)).to(torch.uint8)
        steps = scales.float() * 16
        steps = steps[where] if along == 0 else steps[:, where[::group_size] // group_size]
        upper = IntCodes(chosen, steps, torch.full_like(steps, 8, dtype=torch.uint8))
    return Grid(IntCodes(codes & 15, scales, zeros), upper, where)
