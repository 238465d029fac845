"""What all kernels over slices share: planes.py as constants, and codes taken out of words in plain Triton."""

import triton
import triton.language as tl

from . import books, planes
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
    "book_assembly": {bits: books.book_assembly(bits) for bits in (2, 3, 4)},
    "book_constraints": {bits: books.book_constraints(bits) for bits in (2, 3, 4)},
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
def book_registers(book, BITS: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr):
    """The books of ROWS rows at `book` as books.py wants them: low and high bytes, four in an int32 [ROWS, 1]."""
    row = tl.arange(0, ROWS)[:, None]
    low = ()
    high = ()
    for four in tl.static_range((1 << BITS) // 4):
        lows = tl.zeros((ROWS, 1), tl.int32)
        highs = tl.zeros((ROWS, 1), tl.int32)
        for place in tl.static_range(4):
            number = (
                tl.load(book + row * (1 << BITS) + four * 4 + place).to(DOT).to(tl.int16, bitcast=True).to(tl.int32)
            )
            lows |= (number & 255) << (8 * place)
            highs |= ((number >> 8) & 255) << (8 * place)
        low = low + (lows,)
        high = high + (highs,)
    return low + high


@triton.jit
def ring_values(words, KIND: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, DOT: tl.constexpr):
    """The values of the rings of a slice [ROWS, SIZE] (see trellis.py): whole numbers between -510 and 510, as int32.

    With `DOT` float16 or bfloat16 (CUDA only) they are numbers of that type, in float16 with 1534 added.
    """
    WIDTH: tl.constexpr = known("width", KIND)
    BITS: tl.constexpr = known("bits", KIND)
    WORDS: tl.constexpr = BITS * 2 // WIDTH
    EACH: tl.constexpr = 4 * WORDS
    # Eight rows of a ring are WORDS words; a thread has those of one strip, and the word that its last states read on.
    octet = tl.arange(0, ROWS // 8)[:, None] * WORDS
    strip = tl.arange(0, SIZE // 4)[None, :]
    windows = ()
    low = tl.load(words + octet * (SIZE // 4) + strip).to(tl.int32) & 0xFFFF
    for word in tl.static_range(1, WORDS + 1):
        high = tl.load(words + (octet + word) % EACH * (SIZE // 4) + strip).to(tl.int32) & 0xFFFF
        windows = windows + ((low | (high << 16)).to(tl.uint32, bitcast=True),)
        low = high
    values = ()
    for weight in tl.static_range(32):
        values = values + (_ring_value(windows, weight, KIND, DOT),)
    for _ in tl.static_range(5):
        values = _joined(values)
    return tl.reshape(tl.permute(values[0], (0, 2, 3, 4, 1, 5, 6)), (ROWS, SIZE))


@triton.jit
def _ring_value(windows, weight: tl.constexpr, KIND: tl.constexpr, DOT: tl.constexpr):
    """The value of a weight, of 32 that are 8 rows by 4 columns."""
    WIDTH: tl.constexpr = known("width", KIND)
    BIT: tl.constexpr = weight // WIDTH * known("bits", KIND)
    state = (windows[BIT // 16] >> (BIT % 16)) & ((1 << known("memory", KIND)) - 1)
    return _byte_sum(state * known("factor", weight % WIDTH) + known("summand", weight % WIDTH), DOT)


@triton.jit
def _joined(values):
    """Half as many tensors: those of the second half beside those of the first, along a new last axis."""
    HALF: tl.constexpr = len(values) // 2
    joined = ()
    for place in tl.static_range(HALF):
        joined = joined + (tl.join(values[place], values[place + HALF]),)
    return joined


@triton.jit
def _byte_sum(mixed, DOT: tl.constexpr):
    """The sum of four bytes less 510, as `ring_values` says."""
    if tl.float16 == DOT:
        # The sum lies in the mantissa of 1024.
        total = tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, 0x01010101, 0x6400;", "=r,r", [mixed], dtype=tl.int32, is_pure=True, pack=1
        )
        value = total.to(tl.int16).to(tl.float16, bitcast=True)
    elif tl.bfloat16 == DOT:
        # The sum lies in the mantissa of 2^23 in float32.
        total = tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, 0x01010101, 0x4b000000;", "=r,r", [mixed], dtype=tl.int32, is_pure=True, pack=1
        )
        value = (total.to(tl.float32, bitcast=True) - 8389118.0).to(tl.bfloat16)
    else:
        total = (mixed & 255) + ((mixed >> 8) & 255) + ((mixed >> 16) & 255) + (mixed >> 24)
        value = total.to(tl.int32) - 510
    return value
