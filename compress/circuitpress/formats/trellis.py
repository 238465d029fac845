"""Trellis-coded weights on rotated inputs: the weights of a tile share one ring of bits, each drawn from 2^L values.

    W = (scale * value) T S        value: `circuitpress_kernels.trellis`, T S: `rotation`

1. Columns are rotated in blocks, so the matrix multiplies rotated inputs and rotated weights are close to Gaussian,
   which is what the values are made for. Rows are not rotated: with a scale a row it gained nothing (error of the
   outputs within 2 % on two checkpoints), and rows stay the heads and neurons that they are.
2. The matrix is cut into strips of `STRIP` columns, a strip read row by row into rings of equal length, of `RING`
   weights where the rows allow it and of what divides the strip near that otherwise. A ring of T weights has exactly
   T * bits bits, and rings follow each other without gaps. (Where nothing divides, less than 2 % of the bits mean
   nothing; a ring has at least the bits of a state, which matrices of ten weights notice.)
3. A row and a strip have a scale each, in 8-bit logarithms:

       scale[r, g] = base * 2^(step * (rows[r] - 255)) * 2^((strips[g] - 128) / 32)

   Strips need one because feedback makes the targets of some strips larger than their weights; what rounding it to
   2.2 % costs is fed back in turn. Rows are refitted when all codes are known (see `quantize.trellis`), which takes 4
   to 8 % off the error if steps are fine. So `step` spreads the 256 codes over the range that the matrix has: over
   rows that differ by a factor of 8, steps are 0.9 %.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from circuitpress_kernels.trellis import SPREAD, trellis_table, trellis_values

from .base import Format, pack_bits, packed_size, unpack_bits
from .rotation import Block, block_of, rotate, signs, unrotate

STRIP = 4
"""Columns of a strip. Errors are fed back from strip to strip, not inside: strips of 16 have 24 % more error, strips of
8 have 5 to 10 % more, strips of 2 have 3 to 4 % less (babyllama-105, 2 and 3 bits) and take twice as long to encode."""
RING = 128
"""Weights of a ring. Closing a ring costs bits: error is 3 % higher with 64, and 0.4 % lower with 256, but encoding
is slow where a strip has fewer than 16 rings, as the strips of small matrices do."""
_RINGS = (96, 257)
"""The range in which a length that divides the strip is looked for."""
_SALT = 1
"""Of the signs of the rotation."""
STEPS = 32
"""Steps of the scale in a factor of two."""
_SMALLEST = 2.0**-24
"""The smallest positive float16."""
_RANGE = 2.0**-16
"""The least scale of a row, as a part of the largest."""
_ROOM = 0.125
"""Factors of two that the codes of rows reach beyond the least and the largest."""


class TrellisCodes(NamedTuple):
    """A segment on a trellis."""

    codes: Tensor
    """uint8 [sum of the rings' steps], in the order of the strips"""
    base: Tensor
    """float16 [2]: the largest scale of a row, and the step of their logarithms (base 2)"""
    rows: Tensor
    """uint8 [rows]: logarithms of the rows' scales"""
    strips: Tensor
    """uint8 [ceil(cols / STRIP)]: logarithms of the strips' scales"""
    shape: tuple[int, int]
    """Rows and columns"""


class Rings(NamedTuple):
    """How a strip is cut: `count` rings of `values` weights, each stored as `steps` codes."""

    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    values: int
    steps: int


@dataclass(frozen=True)
class TrellisFormat(Format):
    """`half_bits` / 2 bits a weight, with states of `memory` bits."""

    half_bits: int
    memory: int

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Such as `trellis2`, `trellis2.5`, or `trellis2l10` where the memory is not the usual one."""
        usual = default_memory(self.half_bits)
        return f"trellis{self.half_bits / 2:g}" + ("" if self.memory == usual else f"l{self.memory}")

    @property
    def width(self) -> int:
        """Weights of one state."""
        return 1 if self.half_bits % 2 == 0 else 2

    @property
    def code_bits(self) -> int:
        """Bits of one code: of `width` weights."""
        return self.half_bits * self.width // 2

    def rings(self, weights: int) -> Rings:
        """How a strip of so many weights is cut; the last ring may have to be filled up."""
        fitting = [n for n in range(*_RINGS) if weights % n == 0 and n % self.width == 0]
        if weights <= RING:
            values = weights
        elif fitting:
            values = min(fitting, key=lambda n: abs(n - RING))
        else:
            values = -(-weights // -(-weights // RING))
        values += values % self.width
        return Rings(-(-weights // values), values, max(values // self.width, -(-self.memory // self.code_bits)))

    def table(self, device: torch.device | None = None) -> Tensor:
        """The values of all states, float32 [2^memory, width], of unit variance."""
        return trellis_table(self.memory, self.width, device=device).div_(SPREAD)

    def layout(self, rows: int, cols: int) -> dict[str, tuple[torch.dtype, int]]:
        """The rings under `weight`; their scales under `trellis_base`, `trellis_rows` and `trellis_strips`."""
        return {
            "weight": (torch.uint8, packed_size(self._codes(rows, cols), self.code_bits)),
            "trellis_base": (torch.float16, 2),
            "trellis_rows": (torch.uint8, rows),
            "trellis_strips": (torch.uint8, -(-cols // STRIP)),
        }

    def pack(self, value: TrellisCodes) -> dict[str, Tensor]:
        """The flat tensors of `layout`."""
        return {
            "weight": pack_bits(value.codes, self.code_bits),
            "trellis_base": value.base,
            "trellis_rows": value.rows,
            "trellis_strips": value.strips,
        }

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, cols: int) -> TrellisCodes:
        """The inverse of `pack`."""
        codes = unpack_bits(tensors["weight"], self.code_bits, (self._codes(rows, cols),))
        base, by_row, by_strip = (tensors[f"trellis_{name}"] for name in ("base", "rows", "strips"))
        return TrellisCodes(codes, base, by_row, by_strip, (rows, cols))

    def decode(self, value: TrellisCodes) -> Tensor:
        """float32 [rows, cols], in the original basis."""
        return self.to_original_basis(self.decode_rotated(value))

    def to_original_basis(self, weight: Tensor) -> Tensor:
        """Weights [rows, cols] that multiply rotated inputs, turned into ones that multiply inputs."""
        return unrotate(weight, _SALT)

    def decode_rotated(self, value: TrellisCodes) -> Tensor:
        """float32 [rows, cols], in the basis of the codes: what multiplies rotated inputs."""
        rows, cols = value.shape
        whole, rest = divmod(cols, STRIP)
        parts, at = [], 0
        for count, width in ((whole, STRIP), (1, rest)):
            if count * width:
                rings = self.rings(rows * width)
                size = count * rings.count * rings.steps
                codes = value.codes[at : at + size].view(-1, rings.steps)
                parts.append(self.strip_values(codes, rows=rows, strip=width))
                at += size
        across = strip_scales(value.strips).repeat_interleave(STRIP)[:cols]
        return torch.cat(parts, 1).mul_(across).mul_(row_scales(value.base, value.rows)[:, None])

    def strip_values(self, codes: Tensor, *, rows: int, strip: int) -> Tensor:
        """Values float32 [rows, strips * strip] of unit variance from the rings [rings, steps] of strips of a width."""
        rings = self.rings(rows * strip)
        values = trellis_values(codes, code_bits=self.code_bits, memory=self.memory, width=self.width)
        flat = values[:, : rings.values].reshape(-1, rings.count * rings.values)[:, : rows * strip]
        return flat.view(-1, rows, strip).transpose(0, 1).reshape(rows, -1).div_(SPREAD)

    def _codes(self, rows: int, cols: int) -> int:
        """Codes of a segment."""
        cut = [self.rings(rows * (stop - start)) for start, stop in strips(cols)]
        return sum(rings.count * rings.steps for rings in cut)


def default_memory(half_bits: int) -> int:
    """Bits of a state unless a name says otherwise."""
    return 12 if half_bits % 2 == 0 else 13


def strips(cols: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the strips of columns; the last may be narrower."""
    return ((at, min(at + STRIP, cols)) for at in range(0, cols, STRIP))


def row_scales(base: Tensor, codes: Tensor) -> Tensor:
    """The scales float32 [rows] of rows."""
    largest, step = base.double()
    return (largest * torch.exp2(step * (codes.double() - 255))).float()


def row_codes(scales: Tensor) -> tuple[Tensor, Tensor]:
    """The base and the codes nearest to the rows' `scales` [rows], with a little room at either end to move them."""
    largest = scales.amax().clamp(min=_SMALLEST)
    scales = torch.maximum(scales, largest * _RANGE)
    span = (largest / scales).log2().amax() + 2 * _ROOM
    base = torch.stack([largest * 2**_ROOM, span / 255]).to(torch.float16)
    top, step = base.float()
    return base, (255 - (top / scales).log2() / step).round().clamp(0, 255).to(torch.uint8)


def strip_scales(codes: Tensor) -> Tensor:
    """The scales float32 [strips] of strips, which multiply those of rows."""
    return torch.exp2((codes.double() - 128) / STEPS).float()


def strip_codes(scales: Tensor) -> Tensor:
    """The codes uint8 nearest to `scales`."""
    return (128 + STEPS * scales.log2()).round().clamp(0, 255).to(torch.uint8)


def rotate_inputs(matrix: Tensor) -> Tensor:
    """Puts the last axis, that of the columns or of inputs, into the basis of the codes."""
    return rotate(matrix, _SALT)


def input_basis(length: int, *, device: torch.device | None = None) -> tuple[Tensor, Block]:
    """What `rotate_inputs` does to an axis of `length`: it multiplies by signs float32 [length], then mixes blocks."""
    return signs(length, _SALT, device=device), block_of(length)
