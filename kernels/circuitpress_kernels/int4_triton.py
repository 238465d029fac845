"""The Triton kernel of `int4_linear`: dequantise and multiply in one pass over the weights.

1. A program takes one tile of 64 rows and a run of its groups. Small matrices have fewer tiles than a GPU has
   multiprocessors, so the groups of a tile are split over several programs; each writes its partial sums in float32 and
   torch adds them up: unlike atomics, the result does not depend on the order in which programs finish.
2. `code - zero` is a whole number between -15 and 15, exact in every type: it goes to the dot product as it is, and the
   scale, one a row and group, multiplies the float32 result. Weights are never rounded.
3. The weights are the left operand (64 x G/2) and the activations the right (G/2 x 8): a tensor-core instruction is 8
   wide there, so one row of activations wastes 7/8 of the arithmetic, not 15/16. On CUDA cores the conversions alone
   would take longer than reading the weights does.

Triton's interpreter computes bfloat16 silently wrong, so there the operands are widened to float32 first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from .int4 import MAX_BATCH, TILE_ROWS

# Fused multiply-adds are Triton's default until 3.10; unsaid, 3.9 warns.
OPTIONS = {"num_warps": 4, "num_stages": 4, "enable_fp_fusion": True}
_PROGRAMS = 512
"""Programs to aim for: about four for each of the 132 multiprocessors of an H100."""
_MIN_GROUPS = 4
"""Groups of one program, at least: with fewer, starting a program costs more than its work."""
_DOT_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def int4_partials(
    x,
    codes,
    scales,
    zeros,
    partials,
    batch,
    cols,
    x_stride,
    groups,
    groups_each,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
    DOT: tl.constexpr,
):
    """partials[split, b, tile * ROWS + r] = sum of x[b, k] * W[r, k] over the groups of one split.

    Grid (tiles, splits). `x` [batch, cols] with unit stride along cols; `codes`, `scales`, `zeros` as in `Int4Tiles`;
    `partials` float32 [splits, BATCH, tiles * ROWS], written whole.
    """
    HALF: tl.constexpr = GROUP // 2
    tile = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row = tl.arange(0, ROWS)
    col = tl.arange(0, HALF)
    lane = tl.arange(0, BATCH)
    x_row = x + lane[None, :] * x_stride
    total = tl.zeros((ROWS, BATCH), dtype=tl.float32)
    for group in range(split * groups_each, tl.minimum((split + 1) * groups_each, groups)):
        at = (tile * groups + group) * ROWS
        pair = tl.load(codes + at * HALF + row[:, None] * HALF + col[None, :])
        zero = tl.load(zeros + at + row).to(tl.int8)[:, None]
        scale = tl.load(scales + at + row).to(tl.float32)[:, None]
        low_k = group * GROUP + col
        high_k = low_k + HALF
        in_batch = lane[None, :] < batch
        x_low = tl.load(x_row + low_k[:, None], mask=in_batch & (low_k[:, None] < cols), other=0.0).to(DOT)
        x_high = tl.load(x_row + high_k[:, None], mask=in_batch & (high_k[:, None] < cols), other=0.0).to(DOT)
        low = ((pair & 15).to(tl.int8) - zero).to(DOT)
        high = ((pair >> 4).to(tl.int8) - zero).to(DOT)
        part = tl.dot(low, x_low, input_precision="ieee")
        part = tl.dot(high, x_high, part, input_precision="ieee")
        total += part * scale
    at = (split * BATCH + lane[None, :]) * (tl.num_programs(0) * ROWS) + tile * ROWS + row[:, None]
    tl.store(partials + at, total)


def int4_gemv(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, rows: int) -> Tensor:
    """`int4_linear` for 1 to 8 rows of activations, on the device of `x`. Shapes as there."""
    batch, cols = x.shape
    tiles, groups, _, half = codes.shape
    splits, groups_each = split_groups(tiles, groups)
    if x.stride(1) != 1:
        x = x.contiguous()
    partials = x.new_empty(splits, MAX_BATCH, tiles * TILE_ROWS, dtype=torch.float32)
    dot = tl.float32 if knobs.runtime.interpret else _DOT_TYPES[x.dtype]
    int4_partials[(tiles, splits)](
        x,
        codes,
        scales,
        zeros,
        partials,
        batch,
        cols,
        x.stride(0),
        groups,
        groups_each,
        GROUP=2 * half,
        ROWS=TILE_ROWS,
        BATCH=MAX_BATCH,
        DOT=dot,
        **OPTIONS,
    )
    return partials[:, :batch, :rows].sum(0).to(x.dtype)


def split_groups(tiles: int, groups: int) -> tuple[int, int]:
    """(programs a tile, groups a program). A function of the shape alone: results do not change with the device."""
    wanted = max(1, min(_PROGRAMS // tiles, groups // _MIN_GROUPS))
    groups_each = -(-groups // wanted)
    return -(-groups // groups_each), groups_each
