"""Rounding to the fixed levels of bitsandbytes: GPTQ and coordinate descent choose codes and the size of every block.

bitsandbytes itself takes the largest weight of a block for its size and rounds to nearest, without calibration. The
files do not say how codes were chosen, so better ones load as well: a block may be said to be smaller than its largest
weight (which is then clipped) if that lowers the weighted error, and columns make up for each other.
"""

from typing import Self

import torch
from torch import Tensor

from ..formats import AbsmaxCodes, AbsmaxFormat
from .feedback import round_columns
from .polish import Block, Grids

SHRINK = torch.linspace(1.0, 0.6, 17)
"""Factors by which the size of a block is tried to shrink."""
_SMALLEST = 2.0**-60  # A block of zeros has a size too: dividing by zero would make codes of NaN.


class AbsmaxGrids(Grids):
    """Levels that all share and sizes [groups, rows] of a matrix while it is rounded (transposed)."""

    def __init__(self, levels: Tensor, sizes: Tensor) -> None:
        self.levels, self.sizes = levels, sizes
        self.kept = [None] * len(sizes)
        self._middles = (levels[1:] + levels[:-1]) / 2

    def rows(self, index: Tensor) -> Self:
        """The grids of some rows, as a copy."""
        return type(self)(self.levels, self.sizes[:, index])

    @property
    def learned(self) -> list[Tensor]:
        """What is changed in place, each [groups, rows]."""
        return [self.sizes]

    def fit(self, group: int, target: Tensor, importance: Tensor, free: Tensor | None) -> None:
        """Chooses the sizes of a group's blocks from a few candidates."""
        del free
        largest = target.abs().amax(0).clamp(min=_SMALLEST)
        best = torch.full_like(largest, torch.inf)
        for factor in SHRINK.tolist():
            size = largest * factor
            error = importance @ (self._nearest(target, size)[1] - target).square_()
            better = error < best
            best = torch.where(better, error, best)
            self.sizes[group] = torch.where(better, size, self.sizes[group])

    def nearest(self, group: int, target: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and values nearest to `target` [rows]."""
        return self._nearest(target, self.sizes[group])

    def refit(self, group: int, codes: Tensor, block: Block) -> Tensor:
        """The sizes with the least error for `codes` [width, rows], where that is below the present one's."""
        levels, size = self.levels[codes.long()], self.sizes[group]
        square, along = (levels * (block.hessian @ levels)).sum(0), (levels * block.pull).sum(0)
        new = (along / square).nan_to_num_(0, 0, 0).clamp(min=_SMALLEST)
        better = new * (new * square - 2 * along) < size * (size * square - 2 * along)
        self.sizes[group] = torch.where(better, new, size)
        return levels * self.sizes[group]

    def _nearest(self, target: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        codes = torch.bucketize((target / size).contiguous(), self._middles)
        return codes.float(), self.levels[codes] * size


def round_absmax(weight: Tensor, hessian: Tensor, form: AbsmaxFormat, *, polished: bool) -> tuple[AbsmaxCodes, str]:
    """Rounds `weight` [rows, cols] to `form`; the string says how the factorisation of H was rescued.

    `hessian` is float32 [cols, cols]; `polished` adds coordinate descent.
    """
    rows, cols = weight.shape
    width = form.width(cols)
    bounds = [(at, min(at + width, cols)) for at in range(0, cols, width)]
    grids = AbsmaxGrids(form.levels.to(weight.device), torch.ones(len(bounds), rows, device=weight.device))
    codes, _, fallback = round_columns(weight, hessian, bounds, grids, polished=polished)
    return AbsmaxCodes(codes.T.contiguous(), grids.sizes.T.contiguous()), fallback
