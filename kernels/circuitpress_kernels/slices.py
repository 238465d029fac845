"""A matrix of any mixture of formats as one stream of tiles that equal programs read: what it is and means.

    W[r, c] = (code - zero) * scale  |  book[r, code] * scale  |  a 16-bit number       + scattered 16-bit weights

1. Columns of a part are cut into slices of S neighbours (planes.py), rows into tiles of 32. A superblock is the least
   that has whole words: 2 to 16 slices. The words of a tile's superblock are one contiguous chunk, [words, 32, S].
2. Parts along rows that have one format become one band of rows, whatever lies between them; `order` says where a
   tile's rows belong in the result. Parts along columns that have one format become one run of slices; `columns` says
   which activations to gather for it. So formats cost padding once, not once for every head.
3. What does not fill a tile or superblock is padded with weights of zero, and columns that are not there are read as
   zero: every size is taken, with no mask on the weights.
4. The stream (tile after tile, in a tile run after run) is cut into equal bytes, one share for each program, at any
   superblock. A share's part of one tile and run is a *piece*: it writes its own sums, [32, batch], and a second pass
   adds the pieces of a tile in their order. No atomics: results do not depend on which program ends first.
5. On a trellis (trellis.py) a tile's 32 rows by 4 columns are one ring, and rows have one scale. A slice is the first
   words of all its rings, their second words, and so on: neighbouring threads read neighbouring rings. Its columns meet
   activations that were rotated and scaled, which stand beside the others: `Part.source` says where.
6. Outliers are scattered: each row of a tile has the same number of (column, value) pairs, the code below them is zero.

The specification is `slice_weight`: it decodes, piece by piece, what the kernel reads. layout.py makes the stream.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import planes
from .trellis import SPREAD, trellis_values

TILE_ROWS = 32
"""Two warps of 16 rows, the M of a tensor-core instruction. With four warps Hopper's `wgmma` takes over, which spends
twice the instructions: on moving registers (3.0 instead of 1.7 a weight at 4 bits)."""
SPARSE, DENSE, BOOK, TRELLIS = 1, 16, 16, 24
"""Kinds of pieces: 1 scattered, 2 to 8 bits on a grid, 16 dense, 16 + bits in a book, 24 + half bits on a trellis."""
KINDS = 33
"""All kinds are below this."""
CHUNK = 16
"""Words, in which offsets count: a part of every superblock, and what one copy of 32 bytes holds."""
STRIP = 4
"""Columns of a ring of a trellis, whose weights are those of a tile, row after row."""


class SliceForm(NamedTuple):
    """What a kernel is compiled for."""

    rows: int
    cols: int
    size: int
    """S"""
    kinds: int
    """Bit k is set if there are pieces of kind k"""
    shift: int
    """The group of a slice of a run is its number >> shift"""
    bfloat: bool
    """Whether dense pieces are bfloat16, else float16"""


class SliceMatrix(NamedTuple):
    """A matrix as the kernel reads it."""

    words: Tensor
    """int16: all chunks; of scattered pieces the columns, as uint16 [entries, 32]"""
    scales: Tensor
    """float16 [n, 32]: scales [groups, 32] of a tile, its codebooks [32, 2^bits], values of scattered weights"""
    zeros: Tensor
    """uint8 [n, 32]: beside each scale"""
    pieces: Tensor
    """int32 [pieces, 8]: kind; first 16 words; first row of scales; first slice of activations; slices of
    the run before it; superblocks (or 16 scattered entries); row of scales where its codebook begins; tile"""
    programs: Tensor
    """int32 [programs + 1]: the first piece of each program"""
    tiles: Tensor
    """int32 [tiles + 1]: the first piece of each tile"""
    order: Tensor
    """int32 [tiles, 32]: the row of the result, or -1"""
    columns: Tensor
    """int32 [slices * S]: the column to gather for each activation, or -1; none if activations are read in order"""
    form: SliceForm


def bits_of(kind: int) -> int:
    """Bits of a code of a kind of piece, of a state for a trellis."""
    if kind > TRELLIS:
        return (kind - TRELLIS) * width_of(kind) // 2
    return kind - BOOK if kind > DENSE else kind


def width_of(kind: int) -> int:
    """Weights of one state of a trellis."""
    return 1 + kind % 2


def memory_of(kind: int) -> int:
    """Bits of a state of a trellis, those that formats have unless told otherwise."""
    return 11 + width_of(kind)


def fields_of(kind: int) -> int:
    """Slices of a superblock of a kind of piece."""
    return 1 if kind == DENSE or kind > TRELLIS else planes.fields(bits_of(kind))


def slice_weight(matrix: SliceMatrix) -> Tensor:
    """The weights float32 [rows, cols], decoded piece by piece."""
    form = matrix.form
    weight = matrix.scales.new_zeros(form.rows + 1, form.cols + 1, dtype=torch.float32)  # the last of each is padding
    for piece in matrix.pieces.tolist():
        ids = matrix.order[piece[7]].long()
        columns, values = _decode_sparse(matrix, piece) if piece[0] == SPARSE else _decode(matrix, piece)
        if matrix.columns.numel():
            columns = matrix.columns[columns].long()
        columns = torch.where((columns < 0) | (columns > form.cols), form.cols, columns)
        ids = torch.where(ids < 0, form.rows, ids)[:, None]
        weight.index_put_((ids.expand_as(values), columns.expand_as(values)), values, accumulate=True)
    return weight[: form.rows, : form.cols]


def slice_linear_twin(x: Tensor, matrix: SliceMatrix, bias: Tensor | None = None) -> Tensor:
    """The specification of `slice_linear`: float32 throughout, one rounding to the type of `x` at the end."""
    y = x.float() @ slice_weight(matrix).T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _decode(matrix: SliceMatrix, piece: list[int]) -> tuple[Tensor, Tensor]:
    """Activations int64 [1, n] that a piece meets and its values float32 [32, n]."""
    kind, at, scale_at, first, within, count, book_at, _ = piece
    form = matrix.form
    bits = bits_of(kind)
    if kind > TRELLIS:
        return _decode_rings(matrix, piece)
    depth = 1 if kind == DENSE else planes.words(bits)
    chunk = matrix.words[at * CHUNK :][: count * depth * TILE_ROWS * form.size]
    chunk = chunk.view(count, depth, TILE_ROWS, form.size).permute(2, 0, 1, 3).contiguous()
    slices = torch.arange(count * fields_of(kind), device=chunk.device)
    columns = torch.arange(form.size, device=chunk.device) + ((first + slices) * form.size)[:, None]
    if kind == DENSE:
        return columns.view(1, -1), chunk.view(torch.bfloat16 if form.bfloat else torch.float16).float().view(32, -1)
    codes = planes.unpack(chunk, bits)
    group = scale_at + ((within + slices) >> form.shift)
    scale = matrix.scales[group].float().T[:, :, None]
    if kind > DENSE:
        book = matrix.scales[book_at : book_at + 2**bits].view(TILE_ROWS, 2**bits).float()
        values = book.gather(1, codes.view(TILE_ROWS, -1).long()).view(codes.shape) * scale
    else:
        values = (codes.float() - matrix.zeros[group].float().T[:, :, None]) * scale
    return columns.view(1, -1), values.view(TILE_ROWS, -1)


def _decode_rings(matrix: SliceMatrix, piece: list[int]) -> tuple[Tensor, Tensor]:
    kind, at, scale_at, first, within, count, _, _ = piece
    size, bits = matrix.form.size, bits_of(kind)
    words = matrix.words[at * CHUNK :][: count * size * (kind - TRELLIS)].view(count, -1, size // STRIP)
    rings = words.transpose(1, 2).int().contiguous().view(count * size // STRIP, -1)
    stream = (rings[:, :, None] >> torch.arange(16, device=rings.device)) & 1
    stream = stream.view(len(rings), -1, bits) << torch.arange(bits, device=rings.device)
    codes = stream.sum(2).to(torch.uint8)
    values = trellis_values(codes, code_bits=bits, memory=memory_of(kind), width=width_of(kind))
    values = values.view(-1, TILE_ROWS, STRIP).transpose(0, 1).reshape(TILE_ROWS, -1)
    scale = matrix.scales[scale_at + (within >> matrix.form.shift)].float()[:, None] / SPREAD
    columns = torch.arange(count * size, device=rings.device) + first * size
    return columns[None], values * scale


def _decode_sparse(matrix: SliceMatrix, piece: list[int]) -> tuple[Tensor, Tensor]:
    _, at, scale_at, _, _, count, _, _ = piece
    columns = matrix.words[at * CHUNK :][: 16 * count * TILE_ROWS].view(-1, TILE_ROWS).long() & 0xFFFF
    return columns.T, matrix.scales[scale_at : scale_at + 16 * count].float().T
