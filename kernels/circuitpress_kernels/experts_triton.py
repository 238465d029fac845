"""The kernels of `expert_linear` on a GPU: one launch for the weights of all chosen experts, one that adds pieces up.

Programs are a grid of experts that were chosen by programs of an expert. Lanes are the choices of an expert, in their
order; a lane's activations are found through the choice, so nothing is gathered before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .experts import Experts, route
from .launch_triton import OTHER_OPTIONS, constants, launch_for, options
from .slices import TILE_ROWS
from .slices_triton import piece_total

FINISHED = 64
"""Rows of the result in one program."""


@triton.jit
def expert_pieces(
    x, stride, each, cols, words, scales, zeros, pieces, programs, shares, order, starts, active, partials, most,
    KINDS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, BATCH: tl.constexpr, EVEN: tl.constexpr,
    SHIFT: tl.constexpr, BFLOAT: tl.constexpr, ASM: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """partials[piece, l, r] for the l-th choice of the piece's expert. Grid (programs of an expert, chosen experts).

    `partials` is float32 [pieces, most, ROWS]; choice c reads row c // each of `x`; tables as in `Experts` and `Route`.
    """
    expert = tl.load(active + tl.program_id(1))
    first = tl.load(starts + expert)
    count = tl.load(starts + expert + 1) - first
    row = programs + expert * (shares + 1) + tl.program_id(0)
    lane = tl.arange(0, BATCH)[None, :]
    if count > 0:
        for piece in tl.range(tl.load(row), tl.load(row + 1)):
            for done in tl.range(0, count, BATCH):
                here = done + lane < count
                choice = tl.load(order + first + done + lane, mask=here, other=0)
                own = x + (choice // each).to(tl.int64) * stride
                total = piece_total(
                    pieces + piece * 8, own, 0, count - done, cols, words, scales, zeros,
                    KINDS, ROWS, SIZE, BATCH, EVEN, SHIFT, BFLOAT, ASM, DOT,
                )  # fmt: skip
                at = (piece * most + done + lane) * ROWS + tl.arange(0, ROWS)[:, None]
                tl.store(partials + at, total, mask=here)


@triton.jit
def _summed(partials, tiles, places, row, there, lane, most, ROWS: tl.constexpr):
    place = tl.load(places + row, mask=there, other=0)
    first = tl.load(tiles + place // ROWS * 2)
    count = tl.load(tiles + place // ROWS * 2 + 1) - first
    total = tl.zeros(row.shape, tl.float32)
    for piece in tl.range(0, tl.max(count)):
        at = ((first + piece) * most + lane) * ROWS + place % ROWS
        total += tl.load(partials + at, mask=there & (piece < count), other=0.0)
    return total


@triton.jit
def finish_experts(
    partials, tiles, places, choices, order, starts, y, rows, most,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """y[choice, r] from the sums of pieces, r below `rows`. Grid (ceil(rows / BLOCK), choices).

    `choices` int32 [choices] are the experts; `rows` is half of an expert's if GATED.
    """
    place = tl.program_id(1)
    choice = tl.load(order + place)
    expert = tl.load(choices + choice)
    lane = place - tl.load(starts + expert)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = row < rows
    own = places + expert * rows * (2 if GATED else 1)
    total = _summed(partials, tiles, own, row, there, lane, most, ROWS)
    if GATED:
        total = total / (1.0 + tl.exp(-total)) * _summed(partials, tiles, own, row + rows, there, lane, most, ROWS)
    tl.store(y + choice.to(tl.int64) * rows + row, total.to(y.dtype.element_ty), mask=there)


def expert_product(x: Tensor, experts: Experts, choice: Tensor, *, gated: bool) -> Tensor:
    """`expert_linear_twin` on the device of `x`."""
    form, tokens = experts.form, len(choice)
    x = x if x.stride(1) == 1 else x.contiguous()
    tables = route(choice, len(experts.programs))
    hip = torch.version.hip is not None
    programs, choices = experts.programs.shape[1] - 1, choice.numel()
    partials = x.new_empty(len(experts.pieces), tokens, TILE_ROWS, dtype=torch.float32)
    each = 1 if len(x) == choices else choices // tokens
    expert_pieces[(programs, len(tables.active))](
        x, x.stride(0), each, x.shape[1], *experts[:5], programs, *tables, partials, tokens,
        **constants(form, x.dtype, hip, even=False), **options(launch_for(x, form, hip)),
    )  # fmt: skip
    rows = form.rows // (2 if gated else 1)
    y = x.new_empty(tokens, choice.shape[1], rows)
    finish_experts[(triton.cdiv(rows, FINISHED), choices)](
        partials, experts.tiles, experts.places, choice.flatten().int(), tables.order, tables.starts, y, rows, tokens,
        ROWS=TILE_ROWS, BLOCK=FINISHED, GATED=gated, **OTHER_OPTIONS,
    )  # fmt: skip
    return y
