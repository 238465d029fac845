"""Weights decoded on a GPU, for batches at which a dense product is faster, and activations gathered for kernels."""

import triton
import triton.language as tl

from .codes_triton import known, looked_up, plain_codes, ring_values
from .slices import DENSE, KINDS, SPARSE
from .trellis import SPREAD

_DENSE, _SPARSE, _END = tl.constexpr(DENSE), tl.constexpr(SPARSE), tl.constexpr(KINDS)
_UNIT = tl.constexpr(1 / SPREAD)


@triton.jit
def gather_activations(x, stride, columns, gathered, count, BLOCK: tl.constexpr):
    """gathered[b, i] = x[b, columns[i]], zero where columns[i] is negative. Grid (ceil(count / BLOCK), batch)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.program_id(1).to(tl.int64)
    column = tl.load(columns + at, mask=at < count, other=-1)
    value = tl.load(x + lane * stride + column, mask=column >= 0, other=0.0)
    tl.store(gathered + lane * count + at, value, mask=at < count)


@triton.jit
def decode_pieces(
    words, scales, zeros, pieces, order, weight, cols,
    KINDS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, SHIFT: tl.constexpr, BFLOAT: tl.constexpr,
):  # fmt: skip
    """weight[order[tile, r], k] of the pieces of KINDS; `weight` is [rows, cols], cols those of `x` above.

    Grid (pieces,). Scattered weights replace others, so they need a launch of their own, later.
    """
    entry = pieces + tl.program_id(0) * 8
    kind = tl.load(entry)
    words_at = words + tl.load(entry + 1).to(tl.int64) * 16
    scale_at = tl.load(entry + 2).to(tl.int64) * ROWS
    first = tl.load(entry + 3)
    within = tl.load(entry + 4)
    count = tl.load(entry + 5)
    books = scales + tl.load(entry + 6).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    place = tl.load(order + tl.load(entry + 7) * ROWS + row)[:, None]
    out = weight + place.to(tl.int64) * cols
    kk = tl.arange(0, SIZE)[None, :]
    chunk = row[:, None] * SIZE + kk
    for candidate in tl.static_range(1, _END):
        if KINDS & (1 << candidate):  # noqa: SIM102 (decided when it is compiled)
            if kind == candidate:
                for block in tl.range(0, 16 * count if candidate == _SPARSE else count):
                    if candidate == _SPARSE:
                        column = tl.load(words_at + block * ROWS + row[:, None]).to(tl.int32) & 0xFFFF
                        value = tl.load(scales + scale_at + block * ROWS + row[:, None]).to(tl.float32)
                        tl.store(out + column, value, mask=(place >= 0) & (value != 0))
                    elif candidate == _DENSE:
                        number = tl.load(words_at + block * (ROWS * SIZE) + chunk)
                        k = (first + block) * SIZE + kk
                        value = number.to(tl.bfloat16 if BFLOAT else tl.float16, bitcast=True).to(tl.float32)
                        tl.store(out + k, value, mask=(place >= 0) & (k < cols))
                    elif known("trellis", candidate):
                        at = words_at + block * (SIZE * known("half_bits", candidate))
                        value = ring_values(at, candidate, ROWS, SIZE, tl.int32)
                        scale = tl.load(scales + scale_at + (within >> SHIFT) * ROWS + row[:, None]).to(tl.float32)
                        k = (first + block) * SIZE + kk
                        tl.store(out + k, value.to(tl.float32) * (scale * _UNIT), mask=(place >= 0) & (k < cols))
                    else:
                        _decode_codes(
                            words_at, scales + scale_at, zeros + scale_at, books, out, place, first, within, block,
                            cols, known("bits", candidate), known("books", candidate), ROWS, SIZE, SHIFT,
                        )  # fmt: skip


@triton.jit
def _decode_codes(
    words, scales, zeros, books, out, place, first, within, block, cols,
    BITS: tl.constexpr, BOOKS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Writes the weights of one superblock of codes."""
    FIELDS: tl.constexpr = known("fields", BITS)
    WORDS: tl.constexpr = known("words", BITS)
    LANES: tl.constexpr = 16 // known("lower", BITS)
    row = tl.arange(0, ROWS)[:, None]
    kk = tl.arange(0, SIZE)[None, :]
    base = words + block * (WORDS * ROWS * SIZE) + row * SIZE + kk
    high = tl.load(base + (WORDS - 1) * ROWS * SIZE)
    for word in tl.static_range(FIELDS // LANES):
        low = high if WORDS == 1 else tl.load(base + word * ROWS * SIZE)
        for lane in tl.static_range(LANES):
            step = block * FIELDS + word * LANES + lane
            group = ((within + step) >> SHIFT) * ROWS + row
            scale = tl.load(scales + group).to(tl.float32)
            if BOOKS:
                value = looked_up(low, high, books, BITS, word * LANES + lane, ROWS).to(tl.float32)
            else:
                zero = tl.load(zeros + group).to(tl.float32)
                value = plain_codes(low, high, BITS, word * LANES + lane).to(tl.float32) - zero
            k = (first + step) * SIZE + kk
            tl.store(out + k, value * scale, mask=(place >= 0) & (k < cols))
