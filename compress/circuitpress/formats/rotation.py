"""A fixed random rotation of an axis: weights become close to Gaussian, outliers spread over their block.

    rotate(w) = T S w        S: random signs,  T: an orthonormal and symmetric transform of blocks of the axis

1. T S is orthogonal, so x . w = rotate(x) . rotate(w): a matrix stored in rotated columns multiplies rotated inputs.
   T is its own inverse, so `unrotate` is S T.
2. Blocks are Sylvester-Hadamard matrices of the largest power of two, up to 128, that divides the axis: additions
   only, 7 a number at 128 (QuIP#, arXiv 2402.04396, uses one transform of the whole axis; blocks of 128 serve as well
   and stay inside the units that a plan protects). Where that power is below 32 (172 = 4 * 43, or anything odd), the
   odd part comes in as a discrete Hartley transform, cas(2 pi i j / m) / sqrt(m): like the Hadamard matrix it is
   symmetric and its own inverse, and no entry is larger than sqrt(2 / m). It exists for every m, where Hadamard
   matrices have to be looked up.
3. Signs come from a hash of the index, so that a checkpoint decodes alike in every version of torch, and depend on
   nothing but the index: matrices that read the same input share its rotation.

No library rotates an axis of any length: fast-hadamard-transform (CUDA) has tables for a few odd factors.
"""

from math import pi, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST_HADAMARD = 128
_SMALLEST_HADAMARD = 32
LARGEST_BLOCK = 512
"""Of blocks with an odd factor, whose transform multiplies by a matrix."""


class Block(NamedTuple):
    """The Kronecker product of a Hadamard matrix of order `power` (of two) and a Hartley matrix of order `odd`."""

    power: int
    odd: int

    @property
    def size(self) -> int:
        """Entries that are mixed with one another."""
        return self.power * self.odd


def block_of(length: int, *, cap: int | None = None) -> Block:
    """The blocks that an axis of `length` is rotated in, at most `cap` wide."""
    power = length & -length
    hadamard = min(power, LARGEST_HADAMARD)
    most = LARGEST_BLOCK if cap is None else cap
    while hadamard > most:
        hadamard //= 2
    if hadamard >= min(_SMALLEST_HADAMARD, most):
        return Block(hadamard, 1)
    odd = length // power
    return Block(hadamard, max(m for m in range(1, most // hadamard + 1, 2) if odd % m == 0))


def signs(length: int, salt: int, *, device: torch.device | None = None) -> Tensor:
    """Random signs, float32 [length] of -1 and 1: a bit of a 32-bit hash of (index, salt)."""
    mixed = torch.arange(length, device=device) + (salt * 0x9E3779B9 & 0xFFFFFFFF)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # "lowbias32", Wellons 2018; products wrap as they may
        mixed = (mixed ^ (mixed >> shift)) * factor & 0xFFFFFFFF
    return 1.0 - 2.0 * (mixed >> 31)


def rotate(values: Tensor, salt: int, *, cap: int | None = None) -> Tensor:
    """Rotates the last axis of `values`; the type is kept."""
    length = values.shape[-1]
    return _transform(values * signs(length, salt, device=values.device).to(values.dtype), block_of(length, cap=cap))


def unrotate(values: Tensor, salt: int, *, cap: int | None = None) -> Tensor:
    """The inverse of `rotate`."""
    length = values.shape[-1]
    back = _transform(values, block_of(length, cap=cap))
    return back.mul_(signs(length, salt, device=values.device).to(values.dtype))


def _transform(values: Tensor, block: Block) -> Tensor:
    """Applies the block's matrix to every block of the last axis; always a new tensor."""
    shape = values.shape
    result = values.reshape(-1, block.power, block.odd).contiguous()
    half = 1
    while half < block.power:  # The order of these sums is fixed, so the result is the same on every machine.
        pair = result.view(-1, 2, half * block.odd)
        result = torch.stack([pair[:, 0] + pair[:, 1], pair[:, 0] - pair[:, 1]], 1)
        half *= 2
    result = result.view(-1, block.odd)
    if block.odd > 1:
        result = result @ hartley(block.odd, device=values.device).to(values.dtype)
    return result.view(shape) * (1 / sqrt(block.power))


def hartley(order: int, *, device: torch.device | None = None) -> Tensor:
    """The discrete Hartley transform, float64 [order, order]: symmetric, orthonormal, its own inverse."""
    index = torch.arange(order, dtype=torch.float64, device=device)
    angle = torch.outer(index, index).remainder_(order).mul_(2 * pi / order)
    return (angle.cos() + angle.sin()) / sqrt(order)
