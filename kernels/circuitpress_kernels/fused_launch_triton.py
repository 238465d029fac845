"""Launches a product with what stands around it: at most one launch before, one for the weights, one after."""

import torch
import triton
from torch import Tensor

from .fused import Around
from .fused_triton import finish_rows, prepare_row
from .launch_triton import MOST_ROWS, OTHER_OPTIONS, slice_partials, slice_product
from .slices import TILE_ROWS, SliceMatrix

BLOCKS = 8
"""Blocks of the rotation in one program."""
FINISHED = 64
"""Rows of the result in one program."""


def fused_product(x: Tensor, matrix: SliceMatrix, places: Tensor, around: Around) -> Tensor:
    """`fused_linear_twin` on the device of `x`, for any batch of 1 or more."""
    if around.gain is not None or around.turn is not None:
        x = prepare(x, around)
    if x.shape[0] > MOST_ROWS:
        return _finish_many(slice_product(x, matrix, around.bias), around)
    partials, passes, lanes = slice_partials(x, matrix)
    rows = matrix.form.rows // (2 if around.gated else 1)
    y = x.new_empty(x.shape[0], rows)
    residual = y if around.residual is None else around.residual.contiguous()
    finish_rows[(triton.cdiv(rows, FINISHED), passes)](
        partials, matrix.tiles, places, partials if around.bias is None else around.bias, residual, y, x.shape[0], rows,
        ROWS=TILE_ROWS, BATCH=lanes, BLOCK=FINISHED, BIAS=around.bias is not None,
        RESIDUAL=around.residual is not None, GATED=around.gated, **OTHER_OPTIONS,
    )  # fmt: skip
    return y


def _finish_many(y: Tensor, around: Around) -> Tensor:
    """Gates and residual in the type of the product, as torch does: in float32 a long prompt would take gigabytes."""
    if around.gated:
        gate, up = y.chunk(2, 1)
        y = torch.nn.functional.silu(gate) * up
    return y if around.residual is None else y + around.residual


def prepare(x: Tensor, around: Around) -> Tensor:
    """`prepare_twin` on the device of `x`."""
    batch, cols = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    turn, gain = around.turn, around.gain
    turned = 0 if turn is None else len(turn.sources)
    block = 32 if turn is None else turn.block
    out = x.new_empty(batch, cols + turned)
    sources, factors = (out, out) if turn is None else (turn.sources, turn.factors)
    prepare_row[(batch, 1 + triton.cdiv(turned, block * BLOCKS))](
        x, x.stride(0), cols, out if gain is None else gain, around.eps, sources, factors, turned, out,
        NORM=gain is not None, TURN=turn is not None, WIDE=triton.next_power_of_2(cols), BLOCK=block,
        LOG=block.bit_length() - 1, BLOCKS=BLOCKS,
        **OTHER_OPTIONS,
    )  # fmt: skip
    return out
