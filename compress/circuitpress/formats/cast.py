"""Weights kept as floating-point numbers: the checkpoint's own type (nothing is lost) or a 16-bit one."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Format


@dataclass(frozen=True)
class CastFormat(Format):
    """Weights stored as `dtype`."""

    dtype: torch.dtype

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Such as `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")

    def layout(self, rows: int, cols: int) -> dict[str, tuple[torch.dtype, int]]:
        """One tensor, `dense`."""
        return {"dense": (self.dtype, rows * cols)}

    def pack(self, value: Tensor) -> dict[str, Tensor]:
        """The flat tensor of `layout`; `value` is [rows, cols] of any floating type."""
        return {"dense": value.to(self.dtype).reshape(-1).contiguous()}

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, cols: int) -> Tensor:
        """The inverse of `pack`."""
        return tensors["dense"].reshape(rows, cols)

    def decode(self, value: Tensor) -> Tensor:
        """float32 [rows, cols], after the rounding that storing as `dtype` does."""
        return value.to(self.dtype).float()
