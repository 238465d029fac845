"""What all kernels over slices share: planes.py as constants, and codes taken out of words in plain Triton."""

import triton
import triton.language as tl

from . import planes
from .slices import BOOK, KINDS, TRELLIS, bits_of, memory_of, width_of
from .trellis import MIX

_SLICES = [(bits, index) for bits in planes.PLANES for index in range(planes.fields(bits))]
# What planes.py computes, as one constant: Triton makes it part of the key under which it caches a kernel.
_TABLE = tl.constexpr({
    "bits": {kind: bits_of(kind) for kind in range(2, KINDS)},
    "books": {kind: BOOK < kind < TRELLIS for kind in range(2, KINDS)},
    "trellis": {kind: kind > TRELLIS for kind in range(2, KINDS)},
    "half_bits": {kind: kind - TRELLIS for kind in range(2, KINDS)},
    "width": {kind: width_of(kind) for kind in range(2, KINDS)},
    "memory": {kind: memory_of(kind) for kind in range(2, KINDS)},
    "factor": {place: factor for place, (factor, _) in enumerate(MIX)},
    "summand": {place: summand for place, (_, summand) in enumerate(MIX)},
    "lower": {bits: lower for bits, (lower, _) in planes.PLANES.items()},
    "upper": {bits: upper for bits, (_, upper) in planes.PLANES.items()},
    "fields": {bits: planes.fields(bits) for bits in planes.PLANES},
    "words": {bits: planes.words(bits) for bits in planes.PLANES},
    "upper_place": {(bits, index): planes.upper_place(bits, index) for bits, index in _SLICES},
    "place": {(*key, bfloat): planes.place(*key, bfloat=bfloat) for key in _SLICES for bfloat in (False, True)},
    "assembly": {
        (*key, bfloat, nibble): planes.assembly(*key, bfloat=bfloat, nibble=nibble)
        for key in _SLICES
        for bfloat in (False, True)
        for nibble in (0, 1)
    },
})  # fmt: skip


@triton.constexpr_function
def known(name, *key):
    """An entry of the table, by its name and key."""
    return _TABLE.value[name][key if len(key) > 1 else key[0]]


@triton.jit
def plain_codes(low, high, BITS: tl.constexpr, INDEX: tl.constexpr):
    """The codes of a slice as int16."""
    LOWER: tl.constexpr = known("lower", BITS)
    UPPER: tl.constexpr = known("upper", BITS)
    code = (low >> (LOWER * (INDEX % (16 // LOWER)))) & ((1 << LOWER) - 1)
    if UPPER > 0:
        code |= ((high >> known("upper_place", BITS, INDEX)) & ((1 << UPPER) - 1)) << LOWER
    return code


@triton.jit
def looked_up(low, high, books, BITS: tl.constexpr, INDEX: tl.constexpr, ROWS: tl.constexpr):
    """The values of a slice's codes in the books of their rows, float16 [ROWS, SIZE]."""
    row = tl.arange(0, ROWS)[:, None]
    return tl.load(books + row * (1 << BITS) + plain_codes(low, high, BITS, INDEX).to(tl.int32))


@triton.jit
def ring_values(words, KIND: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """The values of the rings of a slice, whole numbers between -510 and 510, int32 [ROWS, SIZE] (see trellis.py)."""
    WIDTH: tl.constexpr = known("width", KIND)
    BITS: tl.constexpr = known("bits", KIND)
    WORDS: tl.constexpr = BITS * 8 // WIDTH
    column = tl.arange(0, SIZE)[None, :]
    weight = tl.arange(0, ROWS)[:, None] * 4 + column % 4
    bit = weight // WIDTH * BITS
    ring = words + column // 4 * WORDS
    low = tl.load(ring + bit // 16).to(tl.int32) & 0xFFFF
    high = tl.load(ring + (bit // 16 + 1) % WORDS).to(tl.int32) << 16
    state = (((low | high) >> (bit % 16)) & ((1 << known("memory", KIND)) - 1)).to(tl.uint32)
    mixed = state * known("factor", 0) + known("summand", 0)
    if WIDTH == 2:
        mixed = tl.where(weight % 2 == 0, mixed, state * known("factor", 1) + known("summand", 1))
    total = (mixed & 255) + ((mixed >> 8) & 255) + ((mixed >> 16) & 255) + (mixed >> 24)
    return total.to(tl.int32) - 510
