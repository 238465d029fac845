"""A stored matrix in the layout of the GPU kernels: every format and mixture of formats.

| stored | in the kernel | bytes a weight beside the codes |
|---|---|---|
| int2 to int6, int8, their `s6` variants; outliers | as stored, scales in 16 bits | 3 / group |
| int7 | 8 bits | 3 / group |
| code2 to code4 | as stored, a book for every row | 2 / group + 2^(bits + 1) / cols |
| trellis, where rows are a multiple of 32 and cols of 4 | as stored, scales of rows in 16 bits | 2 / cols |
| bfloat16, float16 | 16 bits in the compute type | |
| other trellises; groups that are no multiple of 16 | decoded to 16 bits in the compute type | |

Weights on a trellis multiply rotated inputs. So each such part meets activations of its own, which `Turned` puts
beside the others: rotated, and multiplied by the part's scales of strips, which then need no place in the kernel.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from circuitpress_kernels import BOOK, DENSE, TILE_ROWS, TRELLIS, Part, SliceMatrix, join_rows, lay_out
from circuitpress_kernels.launches import choose

from ..formats import CodebookFormat, Format, IntFormat, OutlierFormat, TrellisCodes, TrellisFormat
from ..formats.trellis import RING, STRIP, default_memory, rotate_inputs, row_scales, strip_scales
from .descriptor import Descriptor

_GROUP_STEP = 16
_MOST_SCATTERED = 57344
"""Columns up to which outliers are scattered: their positions, with padding, have 16 bits."""


@dataclass(frozen=True)
class Turned:
    """The activations that parts on a trellis meet. `strips`, float32, are the scales of all their columns."""

    spans: tuple[tuple[int, int], ...]
    """Columns, start and stop, that are rotated: one for each part"""

    def extend(self, x: Tensor, strips: Tensor) -> Tensor:
        """Activations [batch, cols] with the rotated ones beside them, in the type of `x`."""
        if not self.spans:
            return x
        turned = torch.cat([rotate_inputs(x[:, start:stop].float()) for start, stop in self.spans], 1)
        return torch.cat([x, (turned * strips).to(x.dtype)], 1)

    def fold(self, weight: Tensor, strips: Tensor) -> Tensor:
        """Weights float32 [rows, cols] in the original basis from ones that multiply extended activations."""
        if not self.spans:
            return weight
        at = weight.shape[1] - len(strips)
        folded, turned = weight[:, :at].clone(), weight[:, at:] * strips
        form, first = TrellisFormat(4, default_memory(4)), 0  # the basis is that of all formats
        for start, stop in self.spans:
            folded[:, start:stop] += form.to_original_basis(turned[:, first : first + stop - start])
            first += stop - start
        return folded


class Sliced(NamedTuple):
    """A matrix that multiplies activations as `turned.extend` makes them."""

    matrix: SliceMatrix
    turned: Turned
    strips: Tensor


def to_slices(descriptor: Descriptor, tensors: Mapping[str, Tensor], *, dtype: torch.dtype) -> Sliced:
    """The matrix of `tensors` for kernels that compute in `dtype` (float16 or bfloat16), on the same device."""
    device = next(iter(tensors.values())).device
    found: dict[int, list[Part]] = {}
    spans: list[tuple[int, int]] = []
    strips = [torch.zeros(0, device=device)]
    cols = descriptor.cols
    for block in descriptor.blocks(tensors):
        start = block.rows.start if descriptor.axis == "rows" else block.cols.start
        if isinstance(block.format, TrellisFormat) and _in_rings(block.format, block.value):
            part = _rings(start, block.format, block.value)._replace(source=cols)
            spans.append((block.cols.start, block.cols.stop))
            strips.append(strip_scales(block.value.strips).repeat_interleave(STRIP))
            cols += block.cols.stop - block.cols.start
        else:
            width = block.cols.stop - block.cols.start
            part = _part(start, block.format, block.value, width, dtype, scattered=descriptor.cols <= _MOST_SCATTERED)
        found.setdefault(start, []).append(part)
    parts = [join_rows(pieces) for pieces in found.values()]
    programs = 1024
    if device.type == "cuda":
        name, kinds = torch.cuda.get_device_name(device), sum({1 << part.kind for part in parts})
        launch = choose(name, kinds, rows=1, weights=descriptor.rows * cols)
        programs = launch.programs * torch.cuda.get_device_properties(device).multi_processor_count
    widest = 64 if torch.version.hip else 128  # wider ones spill registers
    matrix = lay_out(
        parts, axis=descriptor.axis, rows=descriptor.rows, cols=cols, dtype=dtype, programs=programs, widest=widest
    )
    return Sliced(matrix, Turned(tuple(spans)), torch.cat(strips))


def _in_rings(form: TrellisFormat, value: TrellisCodes) -> bool:
    """Whether the rings are tiles of 32 rows by 4 columns, and states have the usual memory."""
    rows, cols = value.shape
    whole = rows % TILE_ROWS == 0 and cols % STRIP == 0
    return whole and form.rings(rows * STRIP).values == RING and form.memory == default_memory(form.half_bits)


def _rings(start: int, form: TrellisFormat, value: TrellisCodes) -> Part:
    rows, cols = value.shape
    steps = RING // form.width
    codes = value.codes.new_zeros(cols // STRIP, rows // TILE_ROWS, steps, form.width)
    codes[..., 0] = value.codes.view(cols // STRIP, rows // TILE_ROWS, steps)
    codes = codes.view(cols // STRIP, rows, STRIP).transpose(0, 1).reshape(rows, cols)
    scales = row_scales(value.base, value.rows).half()[:, None]
    return Part(start, TRELLIS + form.half_bits, codes, 0, scales)


def _part(start: int, form: Format, value: Any, cols: int, dtype: torch.dtype, *, scattered: bool) -> Part:
    if isinstance(form, OutlierFormat) and scattered and _lines_up(form.base.group_size, cols):
        grid = _part(start, form.base, value.base, cols, dtype, scattered=scattered)
        return grid._replace(outliers=(value.positions, value.values))
    if isinstance(form, IntFormat) and _lines_up(form.group_size, cols):
        kind = 8 if form.bits == 7 else form.bits
        return Part(start, kind, value.codes, form.group_size, value.scales, value.zeros)
    if isinstance(form, CodebookFormat) and _lines_up(form.group_size, cols):
        books = value.books[form.owners(value.codes.shape[0]).to(value.books.device)]
        return Part(start, BOOK + form.bits, value.codes, form.group_size, value.scales, books=books)
    return Part(start, DENSE, form.decode(value).to(dtype))


def _lines_up(group_size: int, cols: int) -> bool:
    """Whether groups are made of whole slices, or are rows."""
    return group_size % _GROUP_STEP == 0 or group_size >= cols
