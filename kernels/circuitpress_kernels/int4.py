"""y = x W^T for 4-bit weights with one scale and zero for every group of a row: layout, specification, dispatch.

    W[n, k] = (code[n, k] - zero[n, k // G]) * scale[n, k // G]

1. The stored form is a stream of nibbles without padding, in which an odd row starts in mid-byte. `int4_tiles` lays
   its codes out anew, once, at load: 64 rows of one group make one contiguous chunk of 32 * G bytes, so that a program
   reads whole cache lines, and rows and groups are padded to whole tiles, so that it reads weights without a mask.
2. Inside a group the low nibble of byte j is code j and the high one is code j + G/2. Both halves then meet a
   contiguous half of the activations; with neighbours in one byte they would meet every second one.
3. `int4_linear_twin` is the specification: it multiplies with the dequantised weights in float32.
4. `int4_linear` is the torch operator: Triton on a GPU for up to 8 rows of activations, where reading the weights is
   what takes the time; above that, dequantised weights and torch's own matmul. Everywhere else the twin.

Nothing in torch takes these formats on a GPU: its int4 operators want symmetric grids or cols in multiples of 1024.
"""

from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_ROWS = 64
"""Rows of one tile: four warps of 16 rows, the M of a tensor-core instruction."""
GROUP_SIZES = (32, 64, 128, 256)
"""Half a group is the K of one dot product, which has to be 16 or more."""
MAX_BATCH = 8
"""Rows of activations of one launch: the N of a tensor-core instruction."""


class Int4Tiles(NamedTuple):
    """A matrix as the kernel reads it; `tiles` = ceil(rows / 64), `groups` = ceil(cols / G)."""

    codes: Tensor
    """uint8 [tiles, groups, 64, G / 2]"""
    scales: Tensor
    """float16 [tiles, groups, 64]; 0 in padded rows, so that they are weights of 0"""
    zeros: Tensor
    """uint8 [tiles, groups, 64]"""


def int4_tiles(codes: Tensor, scales: Tensor, zeros: Tensor, *, group_size: int) -> Int4Tiles:
    """Lays a matrix out in tiles.

    `codes` is uint8 [rows, cols] below 16, `scales` float16 and `zeros` uint8 [rows, ceil(cols / group_size)]; any rows
    and cols. ValueError if the group size is not in GROUP_SIZES.
    """
    if group_size not in GROUP_SIZES:
        raise ValueError(f"a group of {group_size} has no kernel: group sizes are {', '.join(map(str, GROUP_SIZES))}")
    rows, cols = codes.shape
    groups = scales.shape[1]
    tall = -rows % TILE_ROWS
    padded = F.pad(codes, (0, groups * group_size - cols, 0, tall))
    halves = padded.view(-1, TILE_ROWS, groups, 2, group_size // 2).transpose(1, 2)
    joined = halves[:, :, :, 0] | (halves[:, :, :, 1] << 4)
    return Int4Tiles(joined.contiguous(), _tile(F.pad(scales, (0, 0, 0, tall))), _tile(F.pad(zeros, (0, 0, 0, tall))))


def _tile(values: Tensor) -> Tensor:
    return values.view(-1, TILE_ROWS, values.shape[1]).transpose(1, 2).contiguous()


def int4_weight(codes: Tensor, scales: Tensor, zeros: Tensor, *, rows: int, cols: int) -> Tensor:
    """The weights [rows, cols] of a tiled matrix, in float32."""
    code = torch.cat([codes & 15, codes >> 4], dim=-1).float()
    weight = (code - zeros[..., None].float()) * scales[..., None].float()
    return weight.transpose(1, 2).reshape(weight.shape[0] * TILE_ROWS, -1)[:rows, :cols]


def int4_linear_twin(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, rows: int) -> Tensor:
    """The specification of `int4_linear`: float32 throughout, one rounding to the type of `x` at the end."""
    weight = int4_weight(codes, scales, zeros, rows=rows, cols=x.shape[1])
    return (x.float() @ weight.T).to(x.dtype)


@torch.library.custom_op("circuitpress::int4_linear", mutates_args=())
def int4_linear(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, rows: int) -> Tensor:
    """x W^T [batch, rows] for x [batch, cols] (bfloat16, float16 or float32) and the tensors of `Int4Tiles`.

    Products are summed in float32; the result has the type of `x`.
    """
    return int4_linear_twin(x, codes, scales, zeros, rows)


@int4_linear.register_fake
def _int4_linear_shape(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, rows: int) -> Tensor:
    del codes, scales, zeros
    return x.new_empty(x.shape[0], rows)


@int4_linear.register_kernel("cuda")
def _int4_linear_cuda(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, rows: int) -> Tensor:
    if not 0 < x.shape[0] <= MAX_BATCH or not _has_triton():
        return x @ int4_weight(codes, scales, zeros, rows=rows, cols=x.shape[1]).to(x.dtype).T
    from .int4_triton import int4_gemv

    return int4_gemv(x, codes, scales, zeros, rows)


@cache
def _has_triton() -> bool:
    """Whether Triton is installed: it has wheels for Linux only."""
    return find_spec("triton") is not None
