"""Keys and values of an attention layer in few bits, a number of bits for every head: what is stored and means.

    number = code * scale + least          code below 2^bits;  scale and least float16, one pair for a group

1. A token's codes of all heads follow one another in one row of bytes, each head from a whole byte on: heads of any
   bits lie in one tensor, to which tokens are appended. Heads of 16 bits lie there as they are, float32 as float16.
2. A group is `group` tokens of one channel. Some channels of keys are large for all tokens (KIVI, arXiv 2402.02750), so
   groups of channels of one token lose two to five times as much in keys; in values they lose a quarter more or the
   same (four Llamas of 0.3 to 14 million parameters, 2 to 8 bits, groups of 32).
3. `least` is the group's smallest number, which 16-bit numbers have exactly; the scale reaches from it to the largest.

The specification is `read_cache_twin`; on a GPU one launch of kv_triton.py reads all heads of a layer. Nothing in torch
or transformers stores heads of different widths: its quantised caches take one width for a model.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .product import has_triton

WIDTHS = (2, 3, 4, 5, 6, 8, 16)
"""Bits that a head can have."""
_LEAST_SCALE = 2.0**-24
"""The smallest number of float16: a group of equal numbers must not divide by zero."""


class CacheForm(NamedTuple):
    """How the heads of one side, keys or values, are stored."""

    bits: tuple[int, ...]
    """Of each head"""
    dim: int
    """Numbers of a head and token"""
    group: int
    """Tokens that share a scale"""


class CacheRows(NamedTuple):
    """Packed tokens."""

    codes: Tensor
    """uint8 [batch, tokens, bytes of a token]"""
    scales: Tensor
    """float16 [batch, groups, heads below 16 bits, dim, 2]: scale and least number"""


def bytes_of_a_token(form: CacheForm) -> int:
    """Bytes of a row of codes."""
    return sum(_width(bits, form.dim) for bits in form.bits)


def bytes_with_scales(form: CacheForm) -> float:
    """Bytes of a token with its share of scales and least numbers."""
    return bytes_of_a_token(form) + 4 * sum(bits < 16 for bits in form.bits) * form.dim / form.group


def head_table(form: CacheForm) -> Tensor:
    """int32 [heads, 3]: bits, first byte in a row, place among the heads that have scales."""
    rows, first, place = [], 0, 0
    for bits in form.bits:
        rows.append((bits, first, place))
        first += _width(bits, form.dim)
        place += bits < 16
    return torch.tensor(rows, dtype=torch.int32)


def pack_cache(numbers: Tensor, form: CacheForm) -> CacheRows:
    """Packs numbers [batch, heads, tokens, dim] of any floating type; ValueError unless tokens fill groups."""
    batch, _, tokens, dim = numbers.shape
    if tokens % form.group:
        raise ValueError(f"{tokens} tokens do not fill groups of {form.group}")
    codes, scales = [], []
    for head, bits in enumerate(form.bits):
        part = numbers[:, head]
        if bits == 16:
            codes.append(part.to(_half(part.dtype)).contiguous().view(torch.uint8).view(batch, tokens, -1))
            continue
        grouped = part.float().view(batch, -1, form.group, dim)
        least, most = grouped.amin(2), grouped.amax(2)
        least = least.clamp(-65504, 65504).half()
        scale = ((most - least.float()) / (2**bits - 1)).clamp(_LEAST_SCALE, 65504).half()
        code = ((grouped - least.float()[:, :, None]) / scale.float()[:, :, None]).round_().clamp_(0, 2**bits - 1)
        codes.append(_pack_rows(code.to(torch.uint8).view(batch, tokens, dim), bits))
        scales.append(torch.stack([scale, least], -1))
    nothing = numbers.new_zeros(batch, tokens // form.group, 0, dim, 2, dtype=torch.float16)
    return CacheRows(torch.cat(codes, 2), torch.stack(scales, 2) if scales else nothing)


def read_cache_twin(rows: CacheRows, form: CacheForm, dtype: torch.dtype) -> Tensor:
    """The numbers [batch, heads, tokens, dim] in `dtype`: float32 until the end, heads of 16 bits as they were."""
    batch, tokens, _ = rows.codes.shape
    numbers = torch.empty(batch, len(form.bits), tokens, form.dim, dtype=dtype, device=rows.codes.device)
    for head, (bits, first, place) in enumerate(head_table(form).tolist()):
        row = rows.codes[:, :, first : first + _width(bits, form.dim)]
        if bits == 16:
            numbers[:, head] = row.contiguous().view(_half(dtype)).to(dtype)
            continue
        code = _unpack_rows(row, bits, form.dim).float().view(batch, -1, form.group, form.dim)
        scale, least = rows.scales[:, :, None, place].float().unbind(-1)
        numbers[:, head] = (code * scale + least).view(batch, tokens, form.dim).to(dtype)
    return numbers


def read_cache(rows: CacheRows, form: CacheForm, table: Tensor, dtype: torch.dtype) -> Tensor:
    """`read_cache_twin` on any device; `table` is `head_table(form)` there."""
    return read_cache_op(*rows, table, list(form.bits), form.dim, form.group, dtype)


@torch.library.custom_op("circuitpress::read_cache", mutates_args=())
def read_cache_op(
    codes: Tensor, scales: Tensor, table: Tensor, bits: list[int], dim: int, group: int, dtype: torch.dtype
) -> Tensor:
    """`read_cache`, with the fields of its tuples one by one."""
    del table
    return read_cache_twin(CacheRows(codes, scales), CacheForm(tuple(bits), dim, group), dtype)


@read_cache_op.register_fake
def _shape(
    codes: Tensor, scales: Tensor, table: Tensor, bits: list[int], dim: int, group: int, dtype: torch.dtype
) -> Tensor:
    del scales, table, group
    return codes.new_empty(codes.shape[0], len(bits), codes.shape[1], dim, dtype=dtype)


@read_cache_op.register_kernel("cuda")
def _on_a_gpu(
    codes: Tensor, scales: Tensor, table: Tensor, bits: list[int], dim: int, group: int, dtype: torch.dtype
) -> Tensor:
    rows, form = CacheRows(codes, scales), CacheForm(tuple(bits), dim, group)
    if not has_triton() or not codes.numel():
        return read_cache_twin(rows, form, dtype)
    from .kv_triton import read_rows

    return read_rows(rows, form, table, dtype)


def _half(dtype: torch.dtype) -> torch.dtype:
    """The type in which heads of 16 bits are stored."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float16


def _width(bits: int, dim: int) -> int:
    return (dim * bits + 7) // 8


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., bytes]: code i of a row has bits i * bits to (i + 1) * bits - 1 of the row's bytes."""
    dim = codes.shape[-1]
    if bits == 8:
        return codes
    padded = torch.nn.functional.pad(codes, (0, -dim % 8)).view(*codes.shape[:-1], -1, 8).long()
    words = (padded << (bits * torch.arange(8, device=codes.device))).sum(-1)
    stream = (words[..., None] >> (8 * torch.arange(bits, device=codes.device))) & 0xFF
    return stream.to(torch.uint8).flatten(-2)[..., : _width(bits, dim)]


def _unpack_rows(stream: Tensor, bits: int, dim: int) -> Tensor:
    """The inverse of `_pack_rows`: uint8 [..., dim]."""
    if bits == 8:
        return stream
    if bits in (2, 4):  # no code lies in two bytes
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=stream.device)
        return ((stream[..., None] >> shifts) & (2**bits - 1)).flatten(-2)[..., :dim]
    padded = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % bits))
    padded = padded.view(*stream.shape[:-1], -1, bits).long()
    words = (padded << (8 * torch.arange(bits, device=stream.device))).sum(-1)
    codes = (words[..., None] >> (bits * torch.arange(8, device=stream.device))) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :dim]
