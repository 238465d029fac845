"""Learnable integers on affine grids, with or without outliers beside them.

The gradient of a scale is that of learned step sizes (LSQ, Esser et al. 2020, arXiv 1902.08153, eq. 3). Zeros stay:
they are whole numbers of `bits` bits, and a shift of all codes of a group does the same.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..formats import IntCodes, IntFormat, OutlierCodes, OutlierFormat
from .soft import Soft, group_sums, spread, straight_through


class SoftInt(Soft):
    """Codes [rows, cols] and log scales [rows, groups] are learned."""

    def __init__(self, form: IntFormat, value: IntCodes) -> None:
        super().__init__()
        self.form = form
        size = form.width(value.codes.shape[1])
        self._round_scales, self._size, self._maxq = form.round_scales, size, 2**form.bits - 1
        self.latent = nn.Parameter(value.codes.float())
        self.log_scale = nn.Parameter(value.scales.float().log())
        self.register_buffer("zeros", value.zeros.float())

    def codes(self) -> list[nn.Parameter]:
        """The codes before rounding."""
        return [self.latent]

    def scales(self) -> list[nn.Parameter]:
        """log of the scales."""
        return [self.log_scale]

    def weight(self) -> Tensor:
        """(round(code) - zero) * scale."""
        scales = straight_through(self.log_scale.exp(), self._round_scales)
        return _Affine.apply(self.latent, scales, self.get_buffer("zeros"), self._size, self._maxq)  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def value(self) -> IntCodes:
        """Rounded codes with their scales and zeros."""
        codes = self.latent.round().clamp(0, self._maxq).to(torch.uint8)
        return IntCodes(codes, self._round_scales(self.log_scale.exp()), self.get_buffer("zeros").to(torch.uint8))


class SoftOutliers(Soft):
    """The base is learned around its outliers, which stay as they are."""

    def __init__(self, form: OutlierFormat, value: OutlierCodes) -> None:
        super().__init__()
        self.form = form
        self.base = SoftInt(form.base, value.base)
        self.register_buffer("positions", value.positions)
        self.register_buffer("values", value.values)

    def codes(self) -> list[nn.Parameter]:
        """Those of the base."""
        return self.base.codes()

    def scales(self) -> list[nn.Parameter]:
        """Those of the base."""
        return self.base.scales()

    def weight(self) -> Tensor:
        """The base's weights with the outliers in their places."""
        base = self.base.weight()
        values = self.get_buffer("values").float()
        return base.flatten().index_copy(0, self.get_buffer("positions"), values).view(base.shape)

    def value(self) -> OutlierCodes:
        """The base's codes with the outliers."""
        return OutlierCodes(self.base.value(), self.get_buffer("positions"), self.get_buffer("values"))


class _Affine(torch.autograd.Function):
    """The grid's weights; saves codes and scales only, not the chain of elementwise results."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, latent: Tensor, scales: Tensor, zeros: Tensor, size: int, maxq: int
    ) -> Tensor:
        ctx.save_for_backward(latent, scales, zeros)
        ctx.size, ctx.maxq = size, maxq
        cols = latent.shape[1]
        steps = latent.round().clamp_(0, maxq).sub_(spread(zeros, size, cols))
        return steps.mul_(spread(scales, size, cols))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        latent, scales, zeros = ctx.saved_tensors
        cols = latent.shape[1]
        inside = (latent >= -0.5) & (latent <= ctx.maxq + 0.5)
        steps = latent.round().clamp_(0, ctx.maxq).sub_(spread(zeros, ctx.size, cols))
        to_scales = group_sums(gradient * steps, ctx.size, scales.shape[1])
        return gradient * spread(scales, ctx.size, cols) * inside, to_scales, None, None, None
