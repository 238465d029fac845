"""Integers of 2 to 8 bits on an affine grid for every group of consecutive columns of a row.

    w = (code - zero) * scale          code, zero in [0, 2**bits);  scale in float16

Stored without padding: the codes as one bit stream, row after row; zeros likewise; scales as float16. The last group of
a row may be shorter than the others (172 columns are groups of 64, 64 and 44). An 8-, 4- or 2-bit stream is directly
what a kernel loads; runtimes that want other layouts repack once, at load.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

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
    """`bits` per weight in groups of `group_size` columns."""

    bits: int
    group_size: int

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Such as `int4g64`."""
        return f"int{self.bits}g{self.group_size}"

    def groups(self, cols: int) -> int:
        """Groups in a row of `cols` columns."""
        return -(-cols // self.group_size)

    def layout(self, rows: int, cols: int) -> dict[str, tuple[torch.dtype, int]]:
        """Codes under `weight`, then `scales` and `zeros`."""
        groups = rows * self.groups(cols)
        return {
            "weight": (torch.uint8, packed_size(rows * cols, self.bits)),
            "scales": (torch.float16, groups),
            "zeros": (torch.uint8, packed_size(groups, self.bits)),
        }

    def pack(self, value: IntCodes) -> dict[str, Tensor]:
        """The flat tensors of `layout`."""
        return {
            "weight": pack_bits(value.codes, self.bits),
            "scales": value.scales.reshape(-1).contiguous(),
            "zeros": pack_bits(value.zeros, self.bits),
        }

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, cols: int) -> IntCodes:
        """The inverse of `pack`."""
        groups = self.groups(cols)
        return IntCodes(
            unpack_bits(tensors["weight"], self.bits, (rows, cols)),
            tensors["scales"].reshape(rows, groups),
            unpack_bits(tensors["zeros"], self.bits, (rows, groups)),
        )

    def decode(self, value: IntCodes) -> Tensor:
        """float32 [rows, cols]."""
        cols = value.codes.shape[1]
        weight = value.codes.float()
        weight.sub_(value.zeros.float().repeat_interleave(self.group_size, dim=1)[:, :cols])
        return weight.mul_(value.scales.float().repeat_interleave(self.group_size, dim=1)[:, :cols])
