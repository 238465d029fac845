"""What stands around a product, on a GPU: RMSNorm and rotation in one launch before it, the rest where sums are made.

1. `prepare_row` normalises a row of activations and rotates the columns that parts on a trellis meet. A row is at most
   some thousand numbers: every program of a row sums its squares anew, which is faster than another launch.
2. A rotation takes sums and differences of neighbours, puts sums before differences, and again for every bit of the
   index: then all numbers are back in their places. A product with the matrix spills 6 kB in float32.
3. `finish_rows` goes by rows of the result, not by tiles: a gate and its `up` lie in different tiles, of which each may
   have another number of pieces. Pieces are added in their order, as `add_pieces` does.
"""

import triton
import triton.language as tl


@triton.jit
def _normal(x, gain, column, mask, root, NORM: tl.constexpr):
    """Activations as transformers' RMSNorm leaves them: rounded before the gain and after it."""
    value = tl.load(x + column, mask=mask, other=0.0)
    kind: tl.constexpr = value.dtype
    value = value.to(tl.float32)
    if NORM:
        value = (value * root).to(kind).to(tl.float32)
        value = (value * tl.load(gain + column, mask=mask, other=0.0).to(tl.float32)).to(kind).to(tl.float32)
    return value


@triton.jit
def prepare_row(
    x, stride, cols, gain, eps, sources, factors, turned, out,
    NORM: tl.constexpr, TURN: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, LOG: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """out[b] = norm(x[b]), and behind it T(norm(x[b])[sources] * factors[0]) * factors[1] of `turned` columns.

    Grid (batch, 1 + ceil(turned / (BLOCK * BLOCKS))): the first program of a row writes what is not rotated. WIDE is
    a power of two not below cols, BLOCK is 2^LOG.
    """
    lane = tl.program_id(0).to(tl.int64)
    x += lane * stride
    out += lane * (cols + turned)
    each = tl.arange(0, WIDE)
    root = 1.0
    if NORM:
        whole = tl.load(x + each, mask=each < cols, other=0.0).to(tl.float32)
        root = 1.0 / tl.sqrt(tl.sum(whole * whole) / cols + eps)
    if tl.program_id(1) == 0:
        normal = _normal(x, gain, each, each < cols, root, NORM)
        tl.store(out + each, normal.to(out.dtype.element_ty), mask=each < cols)
    elif TURN:
        first = (tl.program_id(1) - 1) * (BLOCK * BLOCKS)
        at = first + tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        there = at < turned
        column = tl.load(sources + at, mask=there, other=0)
        value = _normal(x, gain, column, there, root, NORM) * tl.load(factors + at, mask=there, other=0.0)
        for _ in tl.static_range(LOG):
            even, odd = tl.split(tl.reshape(value, (BLOCKS, BLOCK // 2, 2)))
            value = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (BLOCKS, BLOCK))
        value *= tl.load(factors + turned + at, mask=there, other=0.0) / tl.sqrt(BLOCK * 1.0)
        tl.store(out + cols + at, value.to(out.dtype.element_ty), mask=there)


@triton.jit
def _summed(partials, tiles, places, bias, row, there, lane, batch, lanes, ROWS: tl.constexpr, BIAS: tl.constexpr):
    """Sums of the pieces of rows of the matrix [BATCH, BLOCK], with their bias."""
    place = tl.load(places + row, mask=there, other=0)
    first = tl.load(tiles + place // ROWS)
    count = tl.load(tiles + place // ROWS + 1) - first
    total = tl.zeros(lane.shape, tl.float32) + tl.zeros(row.shape, tl.float32)
    for piece in tl.range(0, tl.max(count)):
        at = ((first + piece) * lanes + lane) * ROWS + place % ROWS
        total += tl.load(partials + at, mask=there & (lane < batch) & (piece < count), other=0.0)
    if BIAS:
        total += tl.load(bias + row, mask=there, other=0.0).to(tl.float32)
    return total


@triton.jit
def finish_rows(
    partials, tiles, places, bias, residual, y, batch, rows,
    ROWS: tl.constexpr, BATCH: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """y[b, r] from the sums of pieces, r below `rows`; with GATED gates are the rows below, `up` those from `rows` on.

    Grid (ceil(rows / BLOCK), passes); `partials` as `slice_pieces` leaves them, `residual` and `y` [batch, rows].
    """
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    lane = (tl.program_id(1) * BATCH + tl.arange(0, BATCH))[:, None]
    lanes = tl.num_programs(1) * BATCH
    there = row < rows
    total = _summed(partials, tiles, places, bias, row, there, lane, batch, lanes, ROWS, BIAS)
    if GATED:
        up = _summed(partials, tiles, places, bias, row + rows, there, lane, batch, lanes, ROWS, BIAS)
        total = total / (1.0 + tl.exp(-total)) * up
    here = there & (lane < batch)
    at = lane.to(tl.int64) * rows + row
    if RESIDUAL:
        total += tl.load(residual + at, mask=here, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=here)
