"""Affine grids with clipping: the scale and zero of a group of weights that round with the least weighted error.

Minimum and maximum of the group span a grid. Narrower ones clip the extremes and round the rest more finely, so a few
factors are tried, then some around the best, and the one with the smallest weighted squared error is kept, for each row
by itself.
The candidates are evaluated with the scale as it will be stored (float16, or the 6 bits of `formats/scales.py`), so
that what is chosen is what is used.

Asymmetric grids cost `bits` extra bits a group and lower KL by 20 to 26 % against symmetric ones (four checkpoints).
Symmetric ones have their zero in the middle, whatever the group: runtimes that load nothing else need them.
"""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from ..formats.integer import both_halves
from ..formats.scales import round_scales, shared_exponents
from .polish import Block, Grids

SHRINK = torch.linspace(1.0, 0.4, 7)
"""Factors by which the range is narrowed at first. With 9 of them errors are the same within .1 % at 2 to 8 bits."""

AROUND = (-0.05, -0.025, 0.025, 0.05)
"""What is added to the best of them, row by row. On random weights in groups of 64 the two rounds have .2, .9 and 6 %
less error at 3, 4 and 6 bits than 25 factors from 1 to 0.4, in half the time: what counts is how fine they are, and at
many bits to try a range that is wider than the weights'."""

_SMALLEST = 2.0**-24  # The smallest positive float16: a scale of zero would turn weights into NaN.


class AffineGrids(Grids):
    """The grids of a matrix [rows, cols] while it is rounded: every row in every group has its own.

    `maxq` [rows, groups] is the largest code, 0 where weights stay as they are. `tops` (from `scale_tops`) is given for
    scales in 6 bits; `symmetric` grids keep their zero in the middle. All work is done on transposed weights:
    contiguous columns take half the time.
    """

    def __init__(self, maxq: Tensor, tops: Tensor | None = None, *, symmetric: bool = False) -> None:
        self.symmetric = symmetric
        self.maxq = maxq.T.float().clamp(min=1)
        self.kept = [mask if bool(mask.any()) else None for mask in maxq.T == 0]
        self.tops = None if tops is None else tops.T
        self.scales = torch.ones_like(self.maxq)
        self.zeros = ((self.maxq + 1) / 2).floor() if symmetric else torch.zeros_like(self.maxq)

    def rows(self, index: Tensor) -> Self:
        """The grids of some rows, as a copy."""
        tops = None if self.tops is None else self.tops.T[index]
        part = type(self)(self.maxq.T[index], tops, symmetric=self.symmetric)
        part.kept = [None if mask is None else mask[index] for mask in self.kept]
        part.scales, part.zeros = self.scales[:, index], self.zeros[:, index]
        return part

    @property
    def learned(self) -> list[Tensor]:
        """What is changed in place, each [groups, rows]."""
        return [self.scales, self.zeros]

    def fit(self, group: int, target: Tensor, importance: Tensor, free: Tensor | None) -> None:
        """Fits the grids of a group to `target` [width, rows] (see `fit_grid`)."""
        if self.symmetric:
            self.scales[group] = fit_symmetric(target, self.maxq[group], self.zeros[group], importance)
            return
        top = None if self.tops is None else self.tops[group]
        scale, zero = fit_grid(target, self.maxq[group], importance, top=top, free=free)
        self.scales[group], self.zeros[group] = scale.float(), zero

    def nearest(self, group: int, target: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and values nearest to `target` [rows]."""
        return round_to_grid(target, self.scales[group], self.zeros[group], self.maxq[group])

    def settle(
        self, group: int, weight: Tensor, target: Tensor, inner: Tensor, free: Tensor | None, *, out: Tensor
    ) -> Tensor:
        """Rounds the columns of a group in turn (see `Grids.settle`), in units of its scales: half the operations."""
        if free is not None or self.kept[group] is not None:
            return super().settle(group, weight, target, inner, free, out=out)
        scale, zero, maxq = self.scales[group], self.zeros[group], self.maxq[group]
        target.div_(scale).add_(zero)
        torch.div(weight, scale, out=out).add_(zero)
        codes, bottom = torch.empty_like(target), torch.zeros_like(maxq)
        columns = zip(codes.unbind(), target.unbind(), out.unbind(), strict=True)
        for k, (code, wish, wrong) in reversed(list(enumerate(columns))):
            torch.clamp(wish.round_(), bottom, maxq, out=code)
            target[:k].addr_(inner[:k, k], wrong.sub_(code))
        out.mul_(scale)
        return codes

    def descend(self, group: int, codes: Tensor, values: Tensor, gradient: Tensor, block: Block) -> None:
        """Chooses the codes of a group again (see `Grids.descend`), in units of its scales: half the operations."""
        if block.free is not None or self.kept[group] is not None:
            super().descend(group, codes, values, gradient, block)
            return
        scale, zero, maxq = self.scales[group], self.zeros[group], self.maxq[group]
        gradient.div_(scale)
        bottom, step = torch.zeros_like(maxq), torch.empty_like(maxq)
        curvatures = block.hessian.diagonal().tolist()
        columns = zip(curvatures, codes.unbind(), codes.clone().unbind(), gradient.unbind(), strict=True)
        # The tensors are short, so that what a column costs is its number of operations and of views.
        for k, (curvature, code, old, slope) in enumerate(columns):
            torch.sub(old, slope, alpha=1 / curvature if curvature > 0 else 0, out=code)
            torch.clamp(code.round_(), bottom, maxq, out=code)
            gradient[k + 1 :].addr_(block.hessian[k + 1 :, k], torch.sub(code, old, out=step))
        torch.sub(codes, zero, out=values).mul_(scale)

    def refit(self, group: int, codes: Tensor, block: Block) -> Tensor:
        """Scale and zero with the least error for `codes` [width, rows]; returns the new values.

        With x = s (c - z) the error of the block is x^T H x - 2 x^T y, so for every z the best s is a quotient; the
        zeros next to the present one are tried, and nothing changes unless the error falls.
        """
        scale, zero, maxq = self.scales[group], self.zeros[group], self.maxq[group]
        ones = torch.ones_like(codes) if block.free is None else (~block.free).float()
        steps = (codes - zero) * ones
        curved = block.hessian @ steps
        ones_curved = block.hessian @ ones if block.free is not None else block.hessian.sum(1, keepdim=True)
        square, cross, count = (steps * curved).sum(0), (steps * ones_curved).sum(0), (ones * ones_curved).sum(0)
        pull = block.pull * ones
        along, shift = (steps * pull).sum(0), pull.sum(0)
        best = scale * (scale * square - 2 * along)
        best_scale, best_zero = scale, zero
        for move in (0,) if self.symmetric else (0, -1, 1):
            bent, drawn = square - 2 * move * cross + move * move * count, along - move * shift
            s = self._stored(group, (drawn / bent).nan_to_num_(0, 0, 0))
            error = s * (s * bent - 2 * drawn)
            better = (error < best) & (zero + move >= 0) & (zero + move <= maxq)
            best = torch.where(better, error, best)
            best_scale, best_zero = torch.where(better, s, best_scale), torch.where(better, zero + move, best_zero)
        if (kept := self.kept[group]) is not None:
            best_scale, best_zero = torch.where(kept, scale, best_scale), torch.where(kept, zero, best_zero)
        self.scales[group], self.zeros[group] = best_scale, best_zero
        return (codes - best_zero) * best_scale

    def _stored(self, group: int, scale: Tensor) -> Tensor:
        if self.symmetric:
            return _stored_symmetric(scale)
        return _stored(scale, None if self.tops is None else self.tops[group])


def _stored(scale: Tensor, top: Tensor | None) -> Tensor:
    """The nearest scale that can be stored, float32; `top` is infinite where that is a float16 number."""
    plain = scale.clamp(min=_SMALLEST, max=65504).half().float()
    if top is None:
        return plain
    short = top.isfinite()
    return torch.where(short, round_scales(scale, torch.where(short, top, 0)), plain)


def _stored_symmetric(scale: Tensor) -> Tensor:
    return both_halves(scale.clamp(min=_SMALLEST)).float()


def scale_tops(weight: Tensor, bounds: Sequence[tuple[int, int]], bits: int) -> Tensor:
    """Shared exponents [rows, 1] for the 6-bit scales of a segment [rows, cols] in `bits` bits."""
    parts = [weight[:, start:stop] for start, stop in bounds]
    spans = [part.amax(1).clamp(min=0) - part.amin(1).clamp(max=0) for part in parts]
    return shared_exponents(torch.stack(spans, 1).float() / (2**bits - 1))


def fit_grid(
    target: Tensor, maxq: Tensor, importance: Tensor, *, top: Tensor | None = None, free: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scales float16 [rows] and zeros float32 [rows] (whole numbers) of one group.

    `target` [width, rows] (transposed) is what should be represented, `maxq` [rows] the largest code of each row,
    `importance` [width] weighs the squared error of each column, `top` [rows] is the shared exponent of 6-bit scales
    (infinite: float16), `free` [width, rows] are weights that the grid need not represent.
    """
    bulk = target if free is None else target.masked_fill(free, 0)
    low = bulk.amin(0).clamp(max=0)
    high = bulk.amax(0).clamp(min=0)
    bottom = torch.zeros_like(low)

    def attempt(factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = _stored((high - low) * factor / maxq, top)
        z = (-low * factor / s).round().clamp(min=0).minimum(maxq)
        # In units of the scale: a third fewer passes over the weights. A free weight counts as zero, which is on every
        # grid.
        steps = (bulk / s).add_(z)
        wrong = steps.sub_(torch.clamp(steps.round(), bottom, maxq))
        return importance @ wrong.square_() * s.square(), s, z

    scale, zero = _narrowed(low, attempt)
    return scale.half(), zero


def fit_symmetric(target: Tensor, maxq: Tensor, zero: Tensor, importance: Tensor) -> Tensor:
    """Scales float32 [rows] of one group around `zero`, arguments as in `fit_grid`."""
    size = target.abs().amax(0)

    def attempt(factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # The positive side has a code less: its extreme decides where nothing is clipped.
        s = _stored_symmetric(size * factor / (maxq - zero))
        return importance @ (round_to_grid(target, s, zero, maxq)[1] - target).square_(), s, zero

    return _narrowed(size, attempt)[0]


def _narrowed(like: Tensor, attempt: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Scale and zero [rows] with the least error. `attempt` gives error, scale and zero for a factor of each row."""
    best, factor = torch.full_like(like, torch.inf), torch.zeros_like(like)
    scale, zero = torch.ones_like(like), torch.zeros_like(like)
    for steps in (SHRINK.tolist(), AROUND):
        centre = factor
        for step in steps:
            tried = centre + step
            error, s, z = attempt(tried)
            better = error < best
            best, factor = torch.where(better, error, best), torch.where(better, tried, factor)
            scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
    return scale, zero


def round_to_grid(target: Tensor, scale: Tensor, zero: Tensor, maxq: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (whole numbers in float32) and the weights that they stand for; all arguments broadcast to `target`."""
    codes = (target / scale).add_(zero).round_().clamp_(min=0)
    codes = torch.minimum(codes, maxq, out=codes)
    return codes, (codes - zero) * scale
