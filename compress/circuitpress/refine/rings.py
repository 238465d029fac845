"""Learnable scales of trellis-coded weights.

The codes of a ring hang together: moving one weight means encoding its ring again. They stay, and the scales of rows
and strips follow the gradient.
"""

from math import log

import torch
from torch import Tensor, nn

from ..formats import TrellisCodes, TrellisFormat
from ..formats.trellis import STEPS, STRIP, row_scales, strip_scales
from .soft import Soft, straight_through

_PER_NAT = STEPS / log(2)
"""Codes of a strip's scale in a factor of e; the step of rows is a number of the segment."""


class SoftTrellis(Soft):
    """Log scales of rows [rows] and strips [strips] are learned, the rings stay."""

    def __init__(self, form: TrellisFormat, value: TrellisCodes) -> None:
        super().__init__()
        self.form = form
        self._format, self._value = form, value
        neutral = value._replace(
            base=torch.ones_like(value.base),
            rows=torch.full_like(value.rows, 255),
            strips=torch.full_like(value.strips, 128),
        )
        self.register_buffer("values", form.decode_rotated(neutral))
        self.register_buffer("base", value.base)
        self._rows_per_nat = 1 / (float(value.base[1]) * log(2))
        self.rows = nn.Parameter(value.rows.float() / self._rows_per_nat)
        self.strips = nn.Parameter(value.strips.float() / _PER_NAT)

    def scales(self) -> list[nn.Parameter]:
        """Logarithms of the scales of rows and of strips."""
        return [self.rows, self.strips]

    def weight(self) -> Tensor:
        """Values times scales, in the original basis."""
        values = self.get_buffer("values")
        rows = row_scales(self.get_buffer("base"), straight_through(self.rows * self._rows_per_nat, _code))
        strips = strip_scales(straight_through(self.strips * _PER_NAT, _code))
        across = strips.repeat_interleave(STRIP)[: values.shape[1]]
        return self._format.to_original_basis(values * across * rows[:, None])

    @torch.no_grad()
    def value(self) -> TrellisCodes:
        """The rings as they came, with rounded codes of the scales."""
        per_nat = ((self.rows, self._rows_per_nat), (self.strips, _PER_NAT))
        rows, strips = (_code(logs * scale).to(torch.uint8) for logs, scale in per_nat)
        return self._value._replace(rows=rows, strips=strips)


def _code(x: Tensor) -> Tensor:
    return x.round().clamp(0, 255)
