"""Affine grids with clipping: the scale and zero of a group of weights that round with the least weighted error.

Minimum and maximum of the group span the widest grid. Narrower ones clip the extremes and round the rest more finely,
so a few shrink factors are tried and the one with the smallest weighted squared error is kept, for each row by itself.
The candidates are evaluated with the scale as it will be stored (float16), so that what is chosen is what is used.

Asymmetric grids cost `bits` extra bits a group and lower KL by 20 to 26 % against symmetric ones (four checkpoints).
"""

import torch
from torch import Tensor

SHRINK = torch.linspace(1.0, 0.4, 25)
"""Factors by which the range is narrowed."""

_SMALLEST = 2.0**-24  # The smallest positive float16: a scale of zero would turn weights into NaN.


def fit_grid(target: Tensor, maxq: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Scales float16 [rows] and zeros float32 [rows] (whole numbers) of one group.

    `target` [width, rows] (transposed) is what should be represented, `maxq` [rows] the largest code of each row,
    `importance` [width] weighs the squared error of each column.
    """
    low = target.amin(0).clamp(max=0)
    high = target.amax(0).clamp(min=0)
    best = torch.full_like(low, torch.inf)
    scale, zero = torch.ones_like(low, dtype=torch.float16), torch.zeros_like(low)
    for factor in SHRINK.tolist():
        s = ((high - low) * factor / maxq).clamp(min=_SMALLEST).to(torch.float16)
        z = (-low * factor / s.float()).round().clamp(min=0).minimum(maxq)
        error = importance @ (round_to_grid(target, s.float(), z, maxq)[1] - target).square_()
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
    return scale, zero


def round_to_grid(target: Tensor, scale: Tensor, zero: Tensor, maxq: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (whole numbers in float32) and the weights that they stand for; all arguments broadcast to `target`."""
    codes = (target / scale).add_(zero).round_().clamp_(min=0)
    codes = torch.minimum(codes, maxq, out=codes)
    return codes, (codes - zero) * scale
