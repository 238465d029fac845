"""Integers of 2 to 8 bits on a grid for every group of consecutive columns of a row.

    w = (code - zero) * scale          code, zero in [0, 2**bits);  scale in float16

Stored without padding: the codes as one bit stream, row after row; zeros likewise; scales as float16. The last group of
a row may be shorter than the others (172 columns are groups of 64, 64 and 44). An 8-, 4- or 2-bit stream is directly
what a kernel loads; runtimes that want other layouts repack once, at load.

Formats named `...s6` store their scales in 6 bits (scales.py). Formats named `sym...` store no zeros: all of them are
2^(bits - 1), which is what compressed-tensors and vLLM load (a grid of 4 bits goes from -8 to 7). Their scales are
numbers of float16 and of bfloat16, since those runtimes keep scales in the type that the model computes in. `sym8c` has
one scale a row. Once unpacked all are alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import scales as small
from .base import Format, pack_bits, packed_size, unpack_bits


class IntCodes(NamedTuple):
    """A segment on an integer grid: w[r, c] = (codes[r, c] - zeros[r, g]) * scales[r, g], g = c // group_size."""

    codes: Tensor
    """uint8 [rows, cols]"""
    scales: Tensor
    """float16 [rows, groups]"""
    zeros: Tensor
    """uint8 [rows, groups]"""


@dataclass(frozen=True)
class IntFormat(Format):
    """`bits` per weight in groups of `group_size` columns (0: a whole row), with scales in 16 or 6 bits."""

    bits: int
    group_size: int
    scale_bits: int = 16
    symmetric: bool = False

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Such as `int4g64`, `int4g64s6`, `sym4g64` or `sym8c`."""
        group = f"g{self.group_size}" if self.group_size else "c"
        scales = "" if self.scale_bits == 16 else f"s{self.scale_bits}"
        return f"{'sym' if self.symmetric else 'int'}{self.bits}{group}{scales}"

    def width(self, cols: int) -> int:
        """Columns in a group of a matrix with `cols` columns."""
        return self.group_size or cols

    def groups(self, cols: int) -> int:
        """Groups in a row of `cols` columns."""
        return -(-cols // self.width(cols))

    def layout(self, rows: int, cols: int) -> dict[str, tuple[torch.dtype, int]]:
        """Codes under `weight`, then `scales` (or `small_scales` and `exponents`) and, if they differ, `zeros`."""
        groups = rows * self.groups(cols)
        if self.scale_bits == 16:
            scales = {"scales": (torch.float16, groups)}
        else:
            scales = {
                "small_scales": (torch.uint8, packed_size(groups, self.scale_bits)),
                "exponents": (torch.int8, -(-rows // small.ROWS)),
            }
        codes = (torch.uint8, packed_size(rows * cols, self.bits))
        zeros = {} if self.symmetric else {"zeros": (torch.uint8, packed_size(groups, self.bits))}
        return {"weight": codes, **scales, **zeros}

    def round_scales(self, scales: Tensor) -> Tensor:
        """The nearest scales [rows, groups] that this format can store, float16."""
        if self.symmetric:
            return both_halves(scales)
        if self.scale_bits == 16:
            return scales.half()
        return small.round_scales(scales, small.shared_exponents(scales)).half()

    def pack(self, value: IntCodes) -> dict[str, Tensor]:
        """The flat tensors of `layout`."""
        if self.scale_bits == 16:
            scales = {"scales": value.scales.reshape(-1).contiguous()}
        else:
            codes, exponents = small.pack_scales(value.scales)
            scales = {"small_scales": pack_bits(codes, self.scale_bits), "exponents": exponents}
        zeros = {} if self.symmetric else {"zeros": pack_bits(value.zeros, self.bits)}
        return {"weight": pack_bits(value.codes, self.bits), **scales, **zeros}

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, cols: int) -> IntCodes:
        """The inverse of `pack`."""
        groups = self.groups(cols)
        if self.scale_bits == 16:
            scales = tensors["scales"].reshape(rows, groups)
        else:
            codes = unpack_bits(tensors["small_scales"], self.scale_bits, (rows, groups))
            scales = small.unpack_scales(codes, tensors["exponents"])
        if self.symmetric:
            zeros = torch.full((rows, groups), 2 ** (self.bits - 1), dtype=torch.uint8, device=scales.device)
        else:
            zeros = unpack_bits(tensors["zeros"], self.bits, (rows, groups))
        return IntCodes(unpack_bits(tensors["weight"], self.bits, (rows, cols)), scales, zeros)

    def decode(self, value: IntCodes) -> Tensor:
        """float32 [rows, cols]."""
        cols = value.codes.shape[1]
        width = self.width(cols)
        weight = value.codes.float()
        weight.sub_(value.zeros.float().repeat_interleave(width, dim=1)[:, :cols])
        return weight.mul_(value.scales.float().repeat_interleave(width, dim=1)[:, :cols])


def both_halves(scales: Tensor) -> Tensor:
    """The nearest scales that are numbers of float16 and of bfloat16, float16; they are off by 0.4 % at most.

    A bfloat16 number rounded to float16 is still one: below 2^-14, where float16 has steps of 2^-24, whatever has more
    than 8 bits is a multiple of bfloat16's own step.
    """
    return scales.clamp(max=65280).bfloat16().half()
