"""What bitsandbytes stores: fixed levels between -1 and 1 times the largest size of a block, which is float32.

    w = level[code] * absmax[r, c // block]

| name | levels | block | a weight |
|---|---|---|---|
| `nf4` | 16, quantiles of a normal distribution (Dettmers et al. 2023, arXiv 2305.14314) | 64 columns | 4.5 |
| `llmint8` | the 255 multiples of 1 / 127 (LLM.int8, Dettmers et al. 2022, arXiv 2208.07339) | a row | 8 |

The levels are theirs; which code a weight takes and how large a block is said to be, GPTQ decides (quantize/absmax.py).
bitsandbytes cuts the flattened matrix into blocks: these are its blocks where 64 divides the columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .base import Format, pack_bits, packed_size, unpack_bits

NORMAL = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The levels of nf4."""


class AbsmaxCodes(NamedTuple):
    """A segment as codes of levels."""

    codes: Tensor
    """uint8 [rows, cols]"""
    absmax: Tensor
    """float32 [rows, blocks]"""


@dataclass(frozen=True)
class AbsmaxFormat(Format):
    """Codes of `bits` bits in blocks of `block` columns (0: a whole row)."""

    bits: int
    block: int

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`nf4` or `llmint8`."""
        return "nf4" if self.bits == 4 else "llmint8"

    @property
    def levels(self) -> Tensor:
        """What the codes stand for, float32, in rising order."""
        return torch.tensor(NORMAL) if self.bits == 4 else (torch.arange(255) - 127) / 127

    def width(self, cols: int) -> int:
        """Columns in a block of a matrix with `cols` columns."""
        return self.block or cols

    def layout(self, rows: int, cols: int) -> dict[str, tuple[torch.dtype, int]]:
        """Codes under `weight`, then `absmax`."""
        blocks = rows * -(-cols // self.width(cols))
        return {"weight": (torch.uint8, packed_size(rows * cols, self.bits)), "absmax": (torch.float32, blocks)}

    def pack(self, value: AbsmaxCodes) -> dict[str, Tensor]:
        """The flat tensors of `layout`."""
        return {"weight": pack_bits(value.codes, self.bits), "absmax": value.absmax.reshape(-1).contiguous()}

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, cols: int) -> AbsmaxCodes:
        """The inverse of `pack`."""
        return AbsmaxCodes(unpack_bits(tensors["weight"], self.bits, (rows, cols)), tensors["absmax"].reshape(rows, -1))

    def decode(self, value: AbsmaxCodes) -> Tensor:
        """float32 [rows, cols]."""
        cols = value.codes.shape[1]
        absmax = value.absmax.repeat_interleave(self.width(cols), dim=1)[:, :cols]
        if self.bits == 8:  # in the order in which bitsandbytes multiplies
            return (value.codes.float() - 127) * absmax * (1 / 127)
        return self.levels.to(absmax.device)[value.codes.long()] * absmax
