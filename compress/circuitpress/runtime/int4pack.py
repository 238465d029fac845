"""4-bit matrices on a CPU: torch's int4pack operator for a few rows of activations, unpacked blocks for many.

The operator computes w = (q - 8) * s + z with s and z in bfloat16, and is fast only for bfloat16 activations.

1. `pack` moves each group's codes as near to q = code - zero + 8 as its range allows. For 2 and 3 bits, and for 4-bit
   groups whose zero is 8, that makes z exactly 0, and a weight is off by the rounding of its scale alone (2^-9
   relative). z = (8 - zero) * s, rounded as it is, would cost a 2-bit weight up to 1.4 %.
2. `matmul` gives up to 96 rows of activations to the operator. It decodes the weights anew for every few rows: 0.39 ms
   a row for 4096 x 4096 on one core of an AMD EPYC (dense bfloat16: 0.16 ms). Unpacking them once costs 16 ms and then
   0.18 ms a row: the two meet between 80 and 100 rows. Half a million weights are unpacked at a time, so that memory
   does not grow and what is unpacked is still in the cache when it is used.
3. How the operator stores a block of rows differs between instruction sets and is not documented. `_order` asks it: it
   packs codes that spell their own row number and reads where they went, then checks a random block. If the answer
   makes no sense, every size of input goes to the operator.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import IntCodes

GROUP_SIZES = (32, 64, 128, 256)
"""Group sizes that the operator takes."""
ROW_BLOCK = 64
"""Rows are padded to a multiple of this: the largest block of any instruction set (AVX-512)."""
FEW_ROWS = 96
"""Rows of activations up to which the operator is the faster way."""
_CHUNK = 1 << 19
"""Weights that are unpacked at once: 1 MiB of bfloat16. A quarter of it or four times as much was up to 20 % slower."""


class Packed(NamedTuple):
    """A matrix as the operator reads it; rows are padded to a multiple of 64."""

    codes: Tensor
    """uint8 [padded rows, cols / 2], in an order of the operator's own"""
    scales_and_zeros: Tensor
    """bfloat16 [cols / group size, padded rows, 2]"""


def pack(grid: IntCodes, *, group_size: int) -> Packed:
    """The operator's form of a 4-bit grid [rows, cols]; cols must be a multiple of the group size."""
    rows, cols = grid.codes.shape
    groups = cols // group_size
    padded = rows + -rows % ROW_BLOCK
    codes = torch.empty(padded, cols // 2, dtype=torch.uint8)
    table = torch.zeros(groups, padded, 2, dtype=torch.bfloat16)
    step = max(ROW_BLOCK, _CHUNK // cols // ROW_BLOCK * ROW_BLOCK)
    for first in range(0, padded, step):
        last = min(first + step, rows)
        code = grid.codes[first:last].view(-1, groups, group_size).int()
        zero = grid.zeros[first:last].int()
        shift = torch.minimum(torch.maximum(8 - zero, -code.amin(2)), 15 - code.amax(2))
        shifted = (code + shift[..., None]).view(-1, cols)
        shifted = F.pad(shifted, (0, 0, 0, -shifted.shape[0] % ROW_BLOCK), value=8)
        codes[first : first + step] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(shifted, 2)
        scale = grid.scales[first:last].bfloat16()
        table[:, first:last, 0] = scale.T
        table[:, first:last, 1] = ((8 - shift - zero) * scale.float()).T
    return Packed(codes, table)


def matmul(x: Tensor, packed: Packed, *, group_size: int, rows: int) -> Tensor:
    """x W^T, bfloat16 [batch, rows], for x bfloat16 [batch, cols]."""
    order = None if x.shape[0] <= FEW_ROWS else _order()
    if order is None:
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        y = multiply(x.contiguous(), packed.codes, group_size, packed.scales_and_zeros)
    else:
        y = _matmul_unpacked(x, packed, group_size, order)
    return y[:, :rows]


def _matmul_unpacked(x: Tensor, packed: Packed, group_size: int, order: Tensor) -> Tensor:
    cols, block = 2 * packed.codes.shape[1], order.numel()
    groups = cols // group_size
    codes = packed.codes.view(-1, cols, block // 2)
    table = packed.scales_and_zeros.view(groups, -1, block, 2)[:, :, order].permute(1, 0, 3, 2).contiguous()
    pairs = _pairs()
    y = x.new_empty(codes.shape[0], x.shape[0], block)
    step = max(1, _CHUNK // cols // block)
    for first in range(0, codes.shape[0], step):
        part = codes[first : first + step]
        # index_select is four times as fast here as indexing with a tensor.
        value = torch.index_select(pairs, 0, part.reshape(-1).int()).view(torch.bfloat16)
        value = value.view(-1, groups, group_size, block)
        scale, zero = table[first : first + step].split(1, dim=2)
        weight = torch.addcmul(zero, value, scale).view(-1, cols, block)
        torch.matmul(x, weight, out=y[first : first + step])
    out = x.new_empty(x.shape[0], codes.shape[0], block)
    out[:, :, order] = y.transpose(0, 1)
    return out.view(x.shape[0], -1)


@cache
def _pairs() -> Tensor:
    """For each byte the two values `nibble - 8` in bfloat16, low nibble first, as one int32 [256]."""
    byte = torch.arange(256)
    return torch.stack([(byte & 15) - 8, (byte >> 4) - 8], dim=-1).bfloat16().view(torch.int32).view(-1)


@cache
def _order() -> Tensor | None:
    """The row that each nibble of a block holds, int64 [block], if a block is [cols, block / 2] bytes; None if not."""
    generator = torch.Generator().manual_seed(0)
    cols = 32
    for block in (64, 32, 16):
        row = torch.arange(block, dtype=torch.int32)
        tens, ones = (_first_nibbles(digit[:, None].expand(block, cols)) for digit in (row // 16, row % 16))
        order = 16 * tens + ones
        if not torch.equal(order.sort().values, row.long()):
            continue
        sample = torch.randint(0, 16, (128, cols), dtype=torch.int32, generator=generator)
        stored = torch.ops.aten._convert_weight_to_int4pack_for_cpu(sample, 2).view(-1, cols, block // 2)
        rows = torch.empty(128 // block, cols, block, dtype=torch.int32)
        rows[:, :, order] = torch.stack([stored & 15, stored >> 4], dim=-1).view(-1, cols, block).int()
        if torch.equal(rows.transpose(1, 2).reshape(128, cols), sample):
            return order
    return None


def _first_nibbles(codes: Tensor) -> Tensor:
    block = codes.shape[0]
    stored = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 2).view(-1)[: block // 2]
    return torch.stack([stored & 15, stored >> 4], dim=-1).view(-1).long()
