"""Reads a packed cache on a GPU: one launch for all heads of the keys or values of a layer, whatever their bits.

Each program turns a block of tokens of one head into 16-bit numbers. A code lies in at most two neighbouring bytes, at
any of the widths, so bits are data and not a constant: heads need no branch, and a plan no compilation of its own.
Attention then reads the numbers again. Reading codes inside attention would spare that, but is a kernel of its own for
every kind of attention (grouped, capped, masked) that transformers has.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kv import CacheForm, CacheRows
from .launch_triton import OTHER_OPTIONS

_TOKENS = 32
"""Tokens of a program."""


@triton.jit
def read_block(
    codes, scales, table, numbers, tokens, width, code_stride, scale_stride,
    HEADS: tl.constexpr, PACKED: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """numbers[b, h, t, d] of the cache `codes` [batch, tokens, width]. Grid (ceil(tokens / TOKENS), batch * HEADS).

    Of `codes` and `scales` the last dimensions are dense, and `*_stride` are those of the batch; WIDE is the power of
    two above DIM, PACKED the heads that have scales.
    """
    head = tl.program_id(1) % HEADS
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    bits = tl.load(table + head * 3)
    first = tl.load(table + head * 3 + 1)
    place = tl.load(table + head * 3 + 2)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None]
    channel = tl.arange(0, WIDE)[None, :]
    there = (token < tokens) & (channel < DIM)
    byte = channel * bits // 8
    row = codes + batch * code_stride + token.to(tl.int64) * width + first
    low = tl.load(row + byte, mask=there, other=0).to(tl.int32)
    last = (DIM * bits + 7) // 8 - 1
    high = tl.load(row + byte + 1, mask=there & (byte < last), other=0).to(tl.int32)
    word = low | (high << 8)
    kind: tl.constexpr = numbers.dtype.element_ty
    if bits == 16:
        number = word.to(tl.int16).to(tl.float16 if kind == tl.float32 else kind, bitcast=True).to(tl.float32)
    else:
        code = (word >> (channel * bits % 8)) & ((1 << bits) - 1)
        pair = ((token // GROUP) * PACKED + place) * DIM + channel
        at = scales + batch * scale_stride + 2 * pair.to(tl.int64)
        scale = tl.load(at, mask=there, other=0.0).to(tl.float32)
        number = code.to(tl.float32) * scale + tl.load(at + 1, mask=there, other=0.0).to(tl.float32)
    out = numbers + ((batch * HEADS + head) * tokens + token) * DIM + channel
    tl.store(out, number.to(kind), mask=there)


def read_rows(rows: CacheRows, form: CacheForm, table: Tensor, dtype: torch.dtype) -> Tensor:
    """`read_cache_twin` on the device of `rows`."""
    codes, scales = (tensor if _dense_below(tensor) else tensor.contiguous() for tensor in rows)
    batch, tokens, width = codes.shape
    heads = len(form.bits)
    numbers = torch.empty(batch, heads, tokens, form.dim, dtype=dtype, device=codes.device)
    read_block[(triton.cdiv(tokens, _TOKENS), batch * heads)](
        codes, scales, table, numbers, tokens, width, codes.stride(0), scales.stride(0),
        **cache_constants(form), **OTHER_OPTIONS,
    )  # fmt: skip
    return numbers


def cache_constants(form: CacheForm) -> dict[str, object]:
    """The constants of `read_block`."""
    return {
        "HEADS": len(form.bits), "PACKED": sum(bits < 16 for bits in form.bits), "DIM": form.dim,
        "WIDE": triton.next_power_of_2(form.dim), "GROUP": form.group, "TOKENS": _TOKENS,
    }  # fmt: skip


def _dense_below(tensor: Tensor) -> bool:
    """Whether all but the first dimension are dense."""
    return tensor.shape[0] == 0 or tensor[0].is_contiguous()
