"""y = act(W norm(x) + b) + residual for a matrix in slices: what stands around a product in a decoder, in its launches.

1. `gain`: x is divided by the root of its mean square and multiplied by the gain (RMSNorm), rounded where transformers
   rounds, so that a fused model computes what an unfused one does.
2. `turn`: parts on a trellis meet x rotated in blocks of a Hadamard matrix; those columns stand beside the others.
3. Both are one launch before the product; q, k and v, or gate and up, are one matrix, so they share it.
4. `gated`: the first half of the rows are gates, y = silu(gate) * up. `residual` is added last. Both happen where
   pieces are summed, in float32, with one rounding at the end.

Activations need no sums for the zeros of the formats: the product takes them on the way (slices_triton.py).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .product import has_triton
from .slices import SliceForm, SliceMatrix, slice_weight

_FIELDS = len(SliceMatrix._fields) - 1


class Turn(NamedTuple):
    """Columns that are rotated in blocks of `block`, a power of two from 32 to 128."""

    sources: Tensor
    """int32 [columns]: which of x; blocks are runs of neighbours"""
    factors: Tensor
    """float32 [2, columns]: before (signs) and after (scales) the rotation"""
    block: int


class Around(NamedTuple):
    """What stands around a product."""

    gain: Tensor | None = None
    """[columns of x]: the weight of an RMSNorm, in the type of x"""
    eps: float = 0.0
    turn: Turn | None = None
    bias: Tensor | None = None
    """[rows]"""
    residual: Tensor | None = None
    """[batch, rows of the result], in the type of x"""
    gated: bool = False


def places_of(matrix: SliceMatrix) -> Tensor:
    """int32 [rows]: where in the tiles each row of the result lies; the inverse of `order`."""
    order = matrix.order.flatten().long()
    places = torch.empty(matrix.form.rows, dtype=torch.int32, device=order.device)
    there = torch.nonzero(order >= 0)[:, 0]
    places[order[there]] = there.int()
    return places


def fused_linear(x: Tensor, matrix: SliceMatrix, places: Tensor, around: Around) -> Tensor:
    """`fused_linear_twin` on any device, in few launches on a GPU. `places` is that of `places_of`."""
    sources, factors, block = around.turn or (None, None, 0)
    extras = [around.gain, sources, factors, around.bias, around.residual]
    return fused_linear_op(x, [*matrix[:-1], places], *extras, around.eps, block, around.gated, list(matrix.form))


def fused_linear_twin(x: Tensor, matrix: SliceMatrix, around: Around) -> Tensor:
    """The specification: x [batch, columns] to [batch, rows], or half as many if `gated`, in the type of x."""
    y = prepare_twin(x, around).float() @ slice_weight(matrix).T
    return finish_twin(y, around).to(x.dtype)


def prepare_twin(x: Tensor, around: Around) -> Tensor:
    """What the matrix multiplies: x normalised, with the rotated columns beside it."""
    if around.gain is not None:
        wide = x.float()
        x = around.gain * (wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + around.eps)).to(x.dtype)
    if around.turn is None:
        return x
    sources, (before, after), block = around.turn
    turned = (x[:, sources.long()].float() * before).view(len(x), -1, block) @ hadamard(block, x.device)
    return torch.cat([x, (turned.view(len(x), -1) * after).to(x.dtype)], 1)


def finish_twin(y: Tensor, around: Around) -> Tensor:
    """Bias, gates and residual on sums [batch, rows] in float32."""
    if around.bias is not None:
        y = y + around.bias.float()
    if around.gated:
        gate, up = y.chunk(2, 1)
        y = F.silu(gate) * up
    return y if around.residual is None else y + around.residual.float()


def hadamard(size: int, device: torch.device) -> Tensor:
    """The orthonormal Sylvester-Hadamard matrix: (-1)^(ones of i & j) / sqrt(size)."""
    index = torch.arange(size, device=device)
    both = index[:, None] & index
    for shift in (16, 8, 4, 2, 1):
        both = both ^ (both >> shift)
    return (1 - 2 * (both & 1)).float() * size**-0.5


@torch.library.custom_op("circuitpress::fused_linear", mutates_args=())
def fused_linear_op(
    x: Tensor, tensors: list[Tensor], gain: Tensor | None, sources: Tensor | None, factors: Tensor | None,
    bias: Tensor | None, residual: Tensor | None, eps: float, block: int, gated: bool, form: list[int],
) -> Tensor:  # fmt: skip
    """`fused_linear`, with the fields of its tuples one by one."""
    matrix = SliceMatrix(*tensors[:_FIELDS], form=_form(form))
    return fused_linear_twin(x, matrix, _around(gain, sources, factors, bias, residual, eps, block, gated))


@fused_linear_op.register_fake
def _shape(
    x: Tensor, tensors: list[Tensor], gain: Tensor | None, sources: Tensor | None, factors: Tensor | None,
    bias: Tensor | None, residual: Tensor | None, eps: float, block: int, gated: bool, form: list[int],
) -> Tensor:  # fmt: skip
    del tensors, gain, sources, factors, bias, residual, eps, block
    return x.new_empty(x.shape[0], form[0] // (2 if gated else 1))


@fused_linear_op.register_kernel("cuda")
def _on_a_gpu(
    x: Tensor, tensors: list[Tensor], gain: Tensor | None, sources: Tensor | None, factors: Tensor | None,
    bias: Tensor | None, residual: Tensor | None, eps: float, block: int, gated: bool, form: list[int],
) -> Tensor:  # fmt: skip
    matrix = SliceMatrix(*tensors[:_FIELDS], form=_form(form))
    around = _around(gain, sources, factors, bias, residual, eps, block, gated)
    if not x.shape[0] or not has_triton():
        return fused_linear_twin(x, matrix, around)
    from .fused_launch_triton import fused_product

    return fused_product(x, matrix, tensors[_FIELDS], around)


def _form(form: list[int]) -> SliceForm:
    return SliceForm(*form[:-1], bfloat=bool(form[-1]))


def _around(
    gain: Tensor | None, sources: Tensor | None, factors: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    eps: float, block: int, gated: bool,
) -> Around:  # fmt: skip
    turn = None if sources is None or factors is None else Turn(sources, factors, block)
    return Around(gain, eps, turn, bias, residual, gated)
