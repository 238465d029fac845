"""A few weights in float16, the rest in another format: `int3g64+0.5%`.

Exactly ceil(share * rows * cols) weights, wherever they are, are stored as float16 with 16 bits for their position: the
distance to the one before in reading order. That is 0.16 bits a weight at 0.5 %. No two neighbours are further apart
than 65536, since whoever chooses them takes at least one from every run of 32768 weights (`BLOCK`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from .base import Format
from .integer import IntCodes, IntFormat

BLOCK = 1 << 15
"""At least one outlier lies in every full or partial run of so many weights."""


class OutlierCodes(NamedTuple):
    """A segment with outliers."""

    base: IntCodes
    """The codes of all weights; those of outliers mean nothing."""
    positions: Tensor
    """int64 [count], rising: row * cols + col"""
    values: Tensor
    """float16 [count]"""


@dataclass(frozen=True)
class OutlierFormat(Format):
    """`base` with `percent` of the weights in float16."""

    base: IntFormat
    percent: float

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Such as `int3g64+0.5%`."""
        return f"{self.base.name}+{self.percent:g}%"

    def count(self, rows: int, cols: int) -> int:
        """Outliers of a segment; at least one for every `BLOCK` weights."""
        # Rounded first: 0.3 % of 1000 is 3, not the 3.0000000000000004 that would be 4.
        return max(ceil(round(self.percent * rows * cols / 100, 6)), -(-rows * cols // BLOCK))

    def layout(self, rows: int, cols: int) -> dict[str, tuple[torch.dtype, int]]:
        """The tensors of the base, then `outliers` and `outlier_steps`."""
        count = self.count(rows, cols)
        return self.base.layout(rows, cols) | {
            "outliers": (torch.float16, count),
            "outlier_steps": (torch.int16, count),
        }

    def pack(self, value: OutlierCodes) -> dict[str, Tensor]:
        """The flat tensors of `layout`; ValueError for neighbours that are too far apart."""
        steps = value.positions.diff(prepend=value.positions.new_full((1,), -1)) - 1
        if steps.numel() and int(steps.max()) > 0xFFFF:
            raise ValueError(f"outliers are up to {int(steps.max())} weights apart: 16 bits reach 65536")
        # Shifted into the range of a signed type, which more of torch supports.
        stored = (steps - (1 << 15)).to(torch.int16)
        return self.base.pack(value.base) | {"outliers": value.values.contiguous(), "outlier_steps": stored}

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, cols: int) -> OutlierCodes:
        """The inverse of `pack`."""
        steps = tensors["outlier_steps"].long() + (1 << 15)
        return OutlierCodes(self.base.unpack(tensors, rows, cols), (steps + 1).cumsum(0) - 1, tensors["outliers"])

    def decode(self, value: OutlierCodes) -> Tensor:
        """float32 [rows, cols]."""
        weight = self.base.decode(value.base)
        weight.view(-1)[value.positions] = value.values.float()
        return weight
