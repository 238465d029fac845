"""The kernels of `slice_linear` on a GPU: one launch for all formats of a matrix, one that adds its pieces up.

1. `slice_pieces` walks the pieces of its share. A piece's format is a branch that all threads take alike; a matrix
   with one format gets a kernel with one branch.
2. Weights are the left operand of the tensor cores, activations the right: those are 8 wide, so one row of activations
   wastes 7/8 of the arithmetic, not 15/16. On CUDA cores the conversions alone would take longer than the reading.
3. `ASM` (CUDA) leaves codes where they lie in the word, as planes.py says, and looks them up in registers, as books.py
   says. The bias that the first adds is the same for all weights of a slice, so a dot product with ones gives what to
   take off: it needs no other launch to sum activations. Elsewhere codes are shifted, masked, converted or gathered.
4. Codes are whole numbers, exact in every type; scales multiply float32 sums. Weights are never rounded.
5. `add_pieces` sums the pieces of a tile in their order, adds the bias and puts rows where they belong.
"""

import triton
import triton.language as tl

from .codes_triton import book_registers, known, looked_up, plain_codes, ring_values
from .slices import DENSE, KINDS, SPARSE
from .trellis import SPREAD

_DENSE, _SPARSE, _END = tl.constexpr(DENSE), tl.constexpr(SPARSE), tl.constexpr(KINDS)
_UNIT = tl.constexpr(1 / SPREAD)


@triton.jit
def _activations(x, stride, batch, cols, at, SIZE: tl.constexpr, BATCH: tl.constexpr, EVEN: tl.constexpr):
    """A slice of activations [SIZE, BATCH] from column `at` on, zero where there is none."""
    lane = tl.arange(0, BATCH)[None, :]
    k = (at + tl.arange(0, SIZE))[:, None]
    there = lane < batch if EVEN else (lane < batch) & (k < cols)
    return tl.load(x + lane * stride + k, mask=there, other=0.0)


@triton.jit
def _dots(low, high, xs, BITS: tl.constexpr, INDEX: tl.constexpr, ASM: tl.constexpr):
    """sum of (code * 2^p + bias) * x of a slice, float32 [ROWS, BATCH]; without assembly p and bias are 0."""
    if ASM:
        BF: tl.constexpr = xs.dtype == tl.bfloat16
        code: tl.constexpr = known("assembly", BITS, INDEX, BF, 0)
        if known("upper", BITS) > 0:
            number = tl.inline_asm_elementwise(code, "=r,r,r", [low, high], dtype=xs.dtype, is_pure=True, pack=2)
        else:
            number = tl.inline_asm_elementwise(code, "=r,r", [low], dtype=xs.dtype, is_pure=True, pack=2)
        dots = tl.dot(number, xs)
        if BITS == 8 and BF:
            rest: tl.constexpr = known("assembly", BITS, INDEX, BF, 1)
            number = tl.inline_asm_elementwise(rest, "=r,r", [low], dtype=xs.dtype, is_pure=True, pack=2)
            dots += 16.0 * tl.dot(number, xs)
    else:
        dots = tl.dot(plain_codes(low, high, BITS, INDEX).to(xs.dtype), xs, input_precision="ieee")
    return dots


@triton.jit
def _coded_slice(
    total, low, high, ones, xs, scales, zeros, books,
    BITS: tl.constexpr, INDEX: tl.constexpr, BOOKS: tl.constexpr, ROWS: tl.constexpr, SHIFT: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """`total` and the products of one slice."""
    at = (INDEX >> SHIFT) * ROWS + tl.arange(0, ROWS)
    scale = tl.load(scales + at).to(tl.float32)
    if BOOKS:
        value = looked_up(low, high, books, BITS, INDEX, ROWS).to(xs.dtype)
        total += tl.dot(value, xs, input_precision="ieee") * scale[:, None]
    else:
        BF: tl.constexpr = xs.dtype == tl.bfloat16
        sums = tl.dot(ones, xs, input_precision="ieee")
        dots = _dots(low, high, xs, BITS, INDEX, ASM)
        zero = tl.load(zeros + at)
        if ASM:
            PLACE: tl.constexpr = known("place", BITS, INDEX, BF)
            if BITS == 8 and BF:
                bias = zero.to(tl.float32) + 128.0 * 17
            else:
                # The zero with the place and bias of the codes, made like them: one instruction, on a float32's bits.
                FIELD: tl.constexpr = (16 if BF else 13) + PLACE
                bits = (zero.to(tl.int32) << FIELD) | (0x43000000 if BF else 0x44800000)
                bias = bits.to(tl.float32, bitcast=True)
            scale *= 1.0 / (1 << PLACE)
        else:
            bias = zero.to(tl.float32)
        # Two steps: (dots - sums * bias) * scale spares a multiplication, but keeps 70 more registers alive at 3 bits.
        total += dots * scale[:, None]
        total -= sums * (scale * bias)[:, None]
    return total


@triton.jit
def _coded(
    x, stride, batch, cols, words, scales, zeros, books, first, within, count,
    BITS: tl.constexpr, BOOKS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, BATCH: tl.constexpr,
    EVEN: tl.constexpr, SHIFT: tl.constexpr, ASM: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The sums [ROWS, BATCH] of `count` superblocks of codes."""
    FIELDS: tl.constexpr = known("fields", BITS)
    WORDS: tl.constexpr = known("words", BITS)
    LANES: tl.constexpr = 16 // known("lower", BITS)
    chunk = tl.arange(0, ROWS)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    ones = tl.full((ROWS, SIZE), 1.0, DOT)
    total = tl.zeros((ROWS, BATCH), tl.float32)
    for block in tl.range(0, count):
        base = words + block * (WORDS * ROWS * SIZE) + chunk
        skipped = block * FIELDS
        group = ((within + skipped) >> SHIFT) * ROWS
        high = tl.load(base + (WORDS - 1) * ROWS * SIZE)
        for word in tl.static_range(FIELDS // LANES):
            low = high if WORDS == 1 else tl.load(base + word * ROWS * SIZE)
            for lane in tl.static_range(LANES):
                at = (first + skipped + word * LANES + lane) * SIZE
                xs = _activations(x, stride, batch, cols, at, SIZE, BATCH, EVEN).to(DOT)
                total = _coded_slice(
                    total, low, high, ones, xs, scales + group, zeros + group, books, BITS, word * LANES + lane, BOOKS,
                    ROWS, SHIFT, ASM,
                )  # fmt: skip
    return total


@triton.jit
def _booked(
    x, stride, batch, cols, words, scales, books, first, within, count,
    BITS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, BATCH: tl.constexpr, EVEN: tl.constexpr,
    SHIFT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The sums [ROWS, BATCH] of `count` superblocks of codes in books, with assembly."""
    FIELDS: tl.constexpr = known("fields", BITS)
    WORDS: tl.constexpr = known("words", BITS)
    CODE: tl.constexpr = known("book_assembly", BITS)
    CONSTRAINTS: tl.constexpr = known("book_constraints", BITS)
    chunk = tl.arange(0, ROWS)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    row = tl.arange(0, ROWS)
    book = book_registers(books, BITS, ROWS, DOT)
    total = tl.zeros((ROWS, BATCH), tl.float32)
    for block in tl.range(0, count):
        base = words + block * (WORDS * ROWS * SIZE) + chunk
        group = scales + ((within + block * FIELDS) >> SHIFT) * ROWS + row
        stored = (tl.load(base),)
        for word in tl.static_range(1, WORDS):
            stored = stored + (tl.load(base + word * ROWS * SIZE),)
        values = tl.inline_asm_elementwise(
            CODE, CONSTRAINTS, stored + book, dtype=(tl.int16,) * FIELDS, is_pure=True, pack=2
        )
        for index in tl.static_range(FIELDS):
            at = (first + block * FIELDS + index) * SIZE
            xs = _activations(x, stride, batch, cols, at, SIZE, BATCH, EVEN).to(DOT)
            scale = tl.load(group + (index >> SHIFT) * ROWS).to(tl.float32)
            total += tl.dot(values[index].to(DOT, bitcast=True), xs) * scale[:, None]
    return total


@triton.jit
def _dense(
    x, stride, batch, cols, words, first, count,
    ROWS: tl.constexpr, SIZE: tl.constexpr, BATCH: tl.constexpr, EVEN: tl.constexpr, BFLOAT: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """The sums [ROWS, BATCH] of `count` slices of 16-bit numbers."""
    chunk = tl.arange(0, ROWS)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.zeros((ROWS, BATCH), tl.float32)
    for block in tl.range(0, count):
        number = tl.load(words + block * (ROWS * SIZE) + chunk)
        number = number.to(tl.bfloat16 if BFLOAT else tl.float16, bitcast=True).to(DOT)
        xs = _activations(x, stride, batch, cols, (first + block) * SIZE, SIZE, BATCH, EVEN).to(DOT)
        total = tl.dot(number, xs, total, input_precision="ieee")
    return total


@triton.jit
def _trellis(
    x, stride, batch, cols, words, scales, first, count,
    KIND: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, BATCH: tl.constexpr, EVEN: tl.constexpr,
    ASM: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The sums [ROWS, BATCH] of `count` slices on a trellis."""
    SHIFTED: tl.constexpr = ASM and tl.float16 == DOT  # by 1024 + 510
    ones = tl.full((ROWS, SIZE), 1.0, DOT)
    total = tl.zeros((ROWS, BATCH), tl.float32)
    sums = tl.zeros((ROWS, BATCH), tl.float32)
    for block in tl.range(0, count):
        at = words + block * (SIZE * known("half_bits", KIND))
        value = ring_values(at, KIND, ROWS, SIZE, DOT if ASM else tl.int32).to(DOT)
        xs = _activations(x, stride, batch, cols, (first + block) * SIZE, SIZE, BATCH, EVEN).to(DOT)
        total = tl.dot(value, xs, total, input_precision="ieee")
        if SHIFTED:
            sums = tl.dot(ones, xs, sums)
    if SHIFTED:
        total -= 1534.0 * sums
    return total * (tl.load(scales + tl.arange(0, ROWS)).to(tl.float32) * _UNIT)[:, None]


@triton.jit
def _sparse(x, stride, batch, words, values, count, ROWS: tl.constexpr, BATCH: tl.constexpr):
    """The sums [ROWS, BATCH] of 16 * `count` scattered weights of each row."""
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, BATCH)[None, :]
    total = tl.zeros((ROWS, BATCH), tl.float32)
    for entry in tl.range(0, 16 * count):
        column = tl.load(words + entry * ROWS + row).to(tl.int32) & 0xFFFF
        value = tl.load(values + entry * ROWS + row).to(tl.float32)
        xs = tl.load(x + lane * stride + column[:, None], mask=lane < batch, other=0.0)
        total += value[:, None] * xs.to(tl.float32)
    return total


@triton.jit
def piece_total(
    entry, x, stride, batch, cols, words, scales, zeros,
    KINDS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, BATCH: tl.constexpr, EVEN: tl.constexpr,
    SHIFT: tl.constexpr, BFLOAT: tl.constexpr, ASM: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The sums [ROWS, BATCH] of the piece at `entry`. Lane b reads at x + b * stride; `x` may differ between lanes."""
    kind = tl.load(entry)
    words_at = words + tl.load(entry + 1).to(tl.int64) * 16
    scale_at = tl.load(entry + 2).to(tl.int64) * ROWS
    first = tl.load(entry + 3)
    within = tl.load(entry + 4)
    count = tl.load(entry + 5)
    books = scales + tl.load(entry + 6).to(tl.int64) * ROWS
    total = tl.zeros((ROWS, BATCH), tl.float32)
    for candidate in tl.static_range(1, _END):
        if KINDS & (1 << candidate):  # noqa: SIM102 (decided when it is compiled)
            if kind == candidate:
                if candidate == _SPARSE:
                    total = _sparse(x, stride, batch, words_at, scales + scale_at, count, ROWS, BATCH)
                elif candidate == _DENSE:
                    total = _dense(x, stride, batch, cols, words_at, first, count, ROWS, SIZE, BATCH, EVEN, BFLOAT, DOT)
                elif known("trellis", candidate):
                    total = _trellis(
                        x, stride, batch, cols, words_at, scales + scale_at + (within >> SHIFT) * ROWS, first,
                        count, candidate, ROWS, SIZE, BATCH, EVEN, ASM, DOT,
                    )  # fmt: skip
                elif ASM and known("books", candidate):
                    total = _booked(
                        x, stride, batch, cols, words_at, scales + scale_at, books, first, within, count,
                        known("bits", candidate), ROWS, SIZE, BATCH, EVEN, SHIFT, DOT,
                    )  # fmt: skip
                else:
                    total = _coded(
                        x, stride, batch, cols, words_at, scales + scale_at, zeros + scale_at, books, first, within,
                        count, known("bits", candidate), known("books", candidate), ROWS, SIZE,
                        BATCH, EVEN, SHIFT, ASM, DOT,
                    )  # fmt: skip
    return total


@triton.jit
def slice_pieces(
    x, stride, batch, cols, words, scales, zeros, pieces, programs, partials,
    KINDS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, BATCH: tl.constexpr, EVEN: tl.constexpr,
    SHIFT: tl.constexpr, BFLOAT: tl.constexpr, ASM: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """partials[piece, b, r] = sum of x[b, k] * W[r, k] over the columns of a piece. Grid (passes, programs).

    A pass takes BATCH rows of `x` [batch, cols], which has unit stride along cols (perhaps gathered ones); `partials`
    is float32 [pieces, passes * BATCH, ROWS], of which rows below `batch` are written; the others as in `SliceMatrix`.
    """
    done = tl.program_id(0) * BATCH
    program = tl.program_id(1)
    lanes = tl.num_programs(0) * BATCH
    x += done * stride
    batch -= done
    # With many formats, or 3 bits, what a piece needs is computed for each piece: kept for all, it would spill.
    MANY: tl.constexpr = (KINDS & (KINDS - 1)) != 0 or KINDS == 1 << 3
    for piece in tl.range(tl.load(programs + program), tl.load(programs + program + 1), disable_licm=MANY):
        total = piece_total(
            pieces + piece * 8, x, stride, batch, cols, words, scales, zeros,
            KINDS, ROWS, SIZE, BATCH, EVEN, SHIFT, BFLOAT, ASM, DOT,
        )  # fmt: skip
        lane = tl.arange(0, BATCH)[None, :]
        at = (piece * lanes + done + lane) * ROWS + tl.arange(0, ROWS)[:, None]
        tl.store(partials + at, total, mask=lane < batch)


@triton.jit
def add_pieces(
    partials, tiles, order, bias, y, batch, rows, ROWS: tl.constexpr, BATCH: tl.constexpr, BIAS: tl.constexpr
):
    """y[b, order[tile, r]] = bias + sum of partials[piece, b, r] over the pieces of a tile. Grid (tiles, passes)."""
    tile = tl.program_id(0)
    lane = tl.program_id(1) * BATCH + tl.arange(0, BATCH)[:, None]
    lanes = tl.num_programs(1) * BATCH
    row = tl.arange(0, ROWS)[None, :]
    total = tl.zeros((BATCH, ROWS), tl.float32)
    for piece in tl.range(tl.load(tiles + tile), tl.load(tiles + tile + 1)):
        total += tl.load(partials + (piece * lanes + lane) * ROWS + row, mask=lane < batch, other=0.0)
    place = tl.load(order + tile * ROWS + row)
    if BIAS:
        total += tl.load(bias + place, mask=place >= 0, other=0.0).to(tl.float32)
    tl.store(y + lane * rows + place, total, mask=(lane < batch) & (place >= 0))
