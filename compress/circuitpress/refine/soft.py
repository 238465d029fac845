"""Stored codes as something a gradient can move: what all formats share.

A `Soft` module holds the numbers of one segment and computes the weights that it stands for. Its forward pass is
exactly what will be stored (codes rounded, scales rounded to what their bits can say), so what is learned is what is
used; the backward pass goes straight through the rounding (straight-through estimator, Bengio et al. 2013,
arXiv 1308.3432).

Codes are learned in units of the code, so one learning rate suits every matrix and every width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import Format


class Soft(nn.Module, ABC):
    """One segment [rows, cols] whose weights can be learned; `codes` and `scales` list its parameters by kind."""

    form: Format

    def codes(self) -> list[nn.Parameter]:
        """Parameters in units of one code."""
        return []

    def scales(self) -> list[nn.Parameter]:
        """Parameters whose change is a relative change of weights, such as log scales."""
        return []

    @abstractmethod
    def weight(self) -> Tensor:
        """The weights that would be stored now, float32 [rows, cols], with gradients."""

    @abstractmethod
    def value(self) -> Any:
        """The quantized value in the form that the format packs."""


class Fixed(Soft):
    """A segment that is left as it is: it is decoded once."""

    def __init__(self, form: Format, value: Any) -> None:
        super().__init__()
        self.form = form
        self.register_buffer("decoded", form.decode(value))
        self._value = value

    def weight(self) -> Tensor:
        """The decoded weights, without gradients."""
        return self.get_buffer("decoded")

    def value(self) -> Any:
        """The value as it came."""
        return self._value


class SoftLinear(nn.Module):
    """y = x W^T + b where W [rows, cols] is made of segments along `axis`."""

    def __init__(self, parts: list[Soft], axis: str, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.dim = 0 if axis == "rows" else 1
        self.bias = bias

    def segments(self) -> list[Soft]:
        """The parts, in order."""
        return [part for part in self.parts if isinstance(part, Soft)]

    def weight(self) -> Tensor:
        """float32 [rows, cols]."""
        pieces = [part.weight() for part in self.segments()]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., cols] -> [..., rows]."""
        return nn.functional.linear(x, self.weight(), self.bias)


class _Straight(torch.autograd.Function):
    """Rounds in some way; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        del ctx
        return rounding(x).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        del ctx
        return gradient, None


def straight_through(x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """`rounding(x)` in the type of `x`, with the gradient of the identity."""
    return _Straight.apply(x, rounding)  # pyright: ignore[reportReturnType]


def spread(per_group: Tensor, size: int, cols: int) -> Tensor:
    """[rows, groups] to [rows, cols]: every group's number for each of its `size` columns."""
    return per_group.repeat_interleave(size, 1)[:, :cols]


def group_sums(x: Tensor, size: int, groups: int) -> Tensor:
    """[rows, cols] to [rows, groups]: the transpose of `spread`."""
    padded = nn.functional.pad(x, (0, groups * size - x.shape[1]))
    return padded.view(x.shape[0], groups, size).sum(2)
