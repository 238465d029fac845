"""Lays a matrix out as slices.py describes it, once, at load, on the device of its tensors.

1. `_slice_size`: the widest slices that divide all groups and waste at most 2 % of the bytes on padding. Where a
   superblock has 16 slices they are half as wide: with 128 columns the kernel spills registers.
2. Parts of one format become a run each (`_pack_run`), outliers another (`_scatter`).
3. `_stream` numbers tiles and cuts the stream into equal bytes.

Where groups are as many slices in all parts, a slice finds its scale by a shift, and scales are stored once a group;
otherwise once a slice.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import planes
from .slices import (
    CHUNK,
    DENSE,
    SPARSE,
    STRIP,
    TILE_ROWS,
    TRELLIS,
    SliceForm,
    SliceMatrix,
    bits_of,
    fields_of,
    width_of,
)

SLICE_SIZES = (128, 64, 32, 16)
"""A slice is the K of one dot product: 16 or more."""
_LEAST_SHARE = 4096
"""Bytes of one program, at least."""
_WASTE = 1.02
"""Bytes that wider slices may cost, as a factor: they save instructions."""
_AT_ONCE = 1 << 24
"""Weights that are packed at once."""
_BESIDE = ("scales", "zeros", "books")


class Part(NamedTuple):
    """A run of rows or columns of one format, `start` on along the axis of the matrix."""

    start: int
    kind: int
    values: Tensor
    """uint8 [rows, cols]: codes (of a state, at its first weight, on a trellis); for dense parts the weights"""
    group_size: int = 0
    """Columns that share a scale; a row has one scale if it is not below cols"""
    scales: Tensor | None = None
    """float16 [rows, groups]"""
    zeros: Tensor | None = None
    """uint8 [rows, groups]; codebooks have none"""
    books: Tensor | None = None
    """float16 [rows, 2^bits]"""
    outliers: tuple[Tensor, Tensor] | None = None
    """Positions int64 (row * cols + col) and values float16 of weights that stand for themselves"""
    source: int | None = None
    """The first activation that its columns meet, where those are not the matrix's own"""


class _Run(NamedTuple):
    """All of one format in a band, tile after tile."""

    kind: int
    first_slice: int
    chunks: list[int]
    """Superblocks of each tile"""
    words: Tensor
    """int16 [sum of chunks, words of one]"""
    scales: Tensor
    """float16 [n, 32]"""
    zeros: Tensor
    """uint8 [n, 32]"""
    scale_rows: list[int]
    """Rows of `scales` of each tile, its codebooks last"""
    books: int
    """Rows of `scales` that are the codebooks of a tile"""


class _Band(NamedTuple):
    """Rows that have the same runs."""

    rows: Tensor
    """int64: which rows of the matrix"""
    runs: list[_Run]


def lay_out(
    parts: Sequence[Part],
    *,
    axis: str,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    programs: int = 1024,
    widest: int = 128,
    like: Sequence[Part] = (),
) -> SliceMatrix:
    """Lays a matrix [rows, cols] out for `programs` programs; dense parts are stored as `dtype`.

    Parts follow each other along `axis`, "rows" or "cols". Slices have at most `widest` columns, a power of two from 32
    to 128, and with their groups fit the parts `like` as well. ValueError for a group size that is no multiple of 16
    and below the part's columns.
    """
    device = parts[0].values.device
    size = _slice_size(like or parts, widest)
    shift = _shift(like or parts, size, axis)
    by_format: dict[tuple[int, ...], list[Part]] = {}
    for number, part in enumerate(parts):
        # Codebooks, and scales of rings, belong to rows, so that parts of columns cannot share a run.
        alone = number if axis == "cols" and (part.books is not None or part.kind > TRELLIS) else -1
        source = -1 if axis == "cols" or part.source is None else part.source
        by_format.setdefault((part.kind, _reach(part), alone, source), []).append(part)
    columns = torch.zeros(0, dtype=torch.int32, device=device)
    gathered: list[Tensor] = []
    in_order = axis == "rows" and all(part.source is None for part in parts)
    if axis == "rows":
        bands = []
        for same in by_format.values():
            ids = torch.cat([torch.arange(part.start, part.start + part.values.shape[0]) for part in same])
            joined = join_rows(same)._replace(start=0)
            first = sum(map(len, gathered)) // size
            where = torch.arange(first * size, first * size + joined.values.shape[1])
            bands.append(_Band(ids, [_pack_run([joined], size, shift, dtype, first), *_scatter([joined], where)]))
            gathered += [] if in_order else [_gather([joined], size)]
    else:
        runs = []
        for same in by_format.values():
            runs.append(_pack_run(same, size, shift, dtype, sum(map(len, gathered)) // size))
            gathered.append(_gather(same, size))
        columns = torch.cat(gathered)
        where = torch.empty(cols, dtype=torch.long)
        where[columns[columns >= 0].long()] = torch.nonzero(columns >= 0)[:, 0]
        bands = [_Band(torch.arange(rows), runs + _scatter(parts, where))]
    if gathered:
        columns = torch.cat(gathered).to(device=device, dtype=torch.int32)
    stream = _stream(bands, programs, device)
    kinds = sum({1 << run.kind for band in bands for run in band.runs})
    form = SliceForm(rows, cols, size, kinds, shift, dtype == torch.bfloat16)
    return SliceMatrix(*stream, columns=columns, form=form)


def _reach(part: Part) -> int:
    """Columns that share a scale, 0 if a whole row does."""
    return part.group_size if 0 < part.group_size < part.values.shape[1] else 0


def _slice_size(parts: Sequence[Part], widest: int) -> int:
    """The widest slices that divide the groups and waste little on padding."""
    reaches = {_reach(part) for part in parts} - {0}
    if any(reach % SLICE_SIZES[-1] for reach in reaches):
        raise ValueError(f"groups of {sorted(reaches)} columns: the kernel takes multiples of {SLICE_SIZES[-1]}")
    most = widest // 2 if any(fields_of(part.kind) == 16 for part in parts) else widest
    sizes = [size for size in SLICE_SIZES if size <= most and not any(reach % size for reach in reaches)]

    def stored(size: int) -> int:
        wholes = [(part, size * fields_of(part.kind)) for part in parts]
        return sum(part.values.shape[0] * -(-part.values.shape[1] // whole) * whole for part, whole in wholes)

    least = min(map(stored, sizes))
    return next(size for size in sizes if stored(size) <= _WASTE * least)


def _shift(parts: Sequence[Part], size: int, axis: str) -> int:
    """log2 of the slices of a group if that is the same in all parts with scales, 31 for whole rows; else 0."""
    ratios = {_reach(part) // size for part in parts if part.scales is not None}
    ratio = ratios.pop() if len(ratios) == 1 else 1
    whole = axis == "rows" or len(parts) == 1 or (ratio and all(p.values.shape[1] % (ratio * size) == 0 for p in parts))
    if not whole or ratio & (ratio - 1):
        return 0
    return ratio.bit_length() - 1 if ratio else 31


def join_rows(parts: Sequence[Part]) -> Part:
    """Parts of one format that lie below one another, as one."""
    first = parts[0]
    if len(parts) == 1:
        return first
    fields = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("values", *_BESIDE)
        if getattr(first, name) is not None
    }
    positions, values, above = [], [], 0
    for part in parts:
        if part.outliers is not None:
            positions.append(part.outliers[0] + above)
            values.append(part.outliers[1])
        above += part.values.numel()
    outliers = (torch.cat(positions), torch.cat(values)) if positions else None
    return first._replace(**fields, outliers=outliers)


def _gather(parts: Sequence[Part], size: int) -> Tensor:
    """Columns int64 [slices * size] that a run of parts of columns meets, -1 for those that are not there."""
    spans = []
    for part in parts:
        cols = part.values.shape[1]
        source = part.start if part.source is None else part.source
        spans.append(F.pad(torch.arange(source, source + cols), (0, -cols % size), value=-1))
    joined = torch.cat(spans)
    return F.pad(joined, (0, -len(joined) % (size * fields_of(parts[0].kind))), value=-1)


def _pack_run(parts: Sequence[Part], size: int, shift: int, dtype: torch.dtype, first_slice: int) -> _Run:
    """The run of parts that have the same rows and lie side by side."""
    kind, rows = parts[0].kind, parts[0].values.shape[0]
    tall, tiles, each = -rows % TILE_ROWS, -(-rows // TILE_ROWS), fields_of(kind)
    sliced = [F.pad(_without_outliers(part), (0, -part.values.shape[1] % size)) for part in parts]
    values = torch.cat(sliced, 1)
    values = F.pad(values, (0, -values.shape[1] % (size * each), 0, tall)).view(rows + tall, -1, size)
    slices = values.shape[1]
    step = max(TILE_ROWS, _AT_ONCE // (slices * size) // TILE_ROWS * TILE_ROWS)
    packed = [_words(chunk, kind, dtype) for chunk in values.split(step)]
    words = torch.cat(packed).view(tiles * (slices // each), -1)
    chunks = [slices // each] * tiles
    if kind == DENSE:
        nothing = torch.zeros(0, TILE_ROWS, device=words.device)
        return _Run(kind, first_slice, chunks, words, nothing.half(), nothing.byte(), [0] * tiles, 0)
    groups = (slices - 1 >> shift) + 1
    scales = [_tiled(_by_group([part.scales for part in parts], parts, size, shift), groups)]
    zeros = [_tiled(_by_group([part.zeros for part in parts], parts, size, shift), groups)]
    books = parts[0].books
    if books is not None:
        width = books.shape[1]
        scales.append(F.pad(books, (0, 0, 0, tall)).view(tiles, width, TILE_ROWS))
        zeros.append(zeros[0].new_zeros(tiles, width, TILE_ROWS))
        groups += width
    return _Run(
        kind, first_slice, chunks, words, torch.cat(scales, 1).view(-1, TILE_ROWS).half(),
        torch.cat(zeros, 1).view(-1, TILE_ROWS).byte(), [groups] * tiles, 0 if books is None else books.shape[1],
    )  # fmt: skip


def _words(values: Tensor, kind: int, dtype: torch.dtype) -> Tensor:
    """int16 [tiles, superblocks, words, 32, S] from [rows, slices, S]."""
    if kind > TRELLIS:
        return _ring_words(values, kind)
    packed = values.to(dtype).view(torch.int16)[:, :, None] if kind == DENSE else planes.pack(values, bits_of(kind))
    return packed.view(-1, TILE_ROWS, *packed.shape[1:]).permute(0, 2, 3, 1, 4).contiguous()


def _ring_words(codes: Tensor, kind: int) -> Tensor:
    """int16 [tiles, slices, words]: rings of codes [rows, slices, S], of a slice word after word of all its rings."""
    rows, slices, size = codes.shape
    rings = codes.view(-1, TILE_ROWS, slices, size // STRIP, STRIP).permute(0, 2, 3, 1, 4)
    steps = rings.reshape(-1, TILE_ROWS * STRIP)[:, :: width_of(kind)].int()
    stream = (steps[:, :, None] >> torch.arange(bits_of(kind), device=codes.device)) & 1
    words = (stream.view(len(steps), -1, 16) << torch.arange(16, device=codes.device)).sum(2)
    words = words.to(torch.int16).view(rows // TILE_ROWS, slices, size // STRIP, -1)
    return words.transpose(2, 3).reshape(rows // TILE_ROWS, slices, -1)


def _without_outliers(part: Part) -> Tensor:
    """The codes, zero where an outlier stands instead."""
    if part.outliers is None or part.zeros is None:
        return part.values
    values = part.values.clone()
    cols = values.shape[1]
    row, col = part.outliers[0] // cols, part.outliers[0] % cols
    values[row, col] = part.zeros[row, col // (_reach(part) or cols)]
    return values


def _by_group(tables: Sequence[Tensor | None], parts: Sequence[Part], size: int, shift: int) -> Tensor:
    """Scales or zeros [rows, groups] of a run: one for each slice if `shift` is 0."""
    columns = []
    for table, part in zip(tables, parts, strict=True):
        rows, cols = part.values.shape
        if table is None:
            table = torch.zeros(rows, 1, dtype=torch.uint8, device=part.values.device)
            reach = 0
        else:
            reach = _reach(part)
        slices = torch.arange(-(-cols // size), device=table.device)
        group = slices * size // reach if reach else slices * 0
        columns.append(table if shift else table[:, group])
    return torch.cat(columns, 1)


def _tiled(table: Tensor, groups: int) -> Tensor:
    """[tiles, groups, 32] from [rows, fewer groups]."""
    table = F.pad(table, (0, max(0, groups - table.shape[1]), 0, -table.shape[0] % TILE_ROWS))[:, :groups]
    return table.view(-1, TILE_ROWS, groups).transpose(1, 2)


def _scatter(parts: Sequence[Part], where: Tensor) -> list[_Run]:
    """The run of all outliers of parts that have the same rows; `where` maps columns to activations."""
    found = []
    for part in parts:
        if part.outliers is not None:
            positions, values = part.outliers
            row, col = positions // part.values.shape[1], positions % part.values.shape[1]
            found.append((row, where.to(col.device)[col + part.start], values))
    if not found:
        return []
    row, col, value = (torch.cat(column) for column in zip(*found, strict=True))
    row, order = row.sort(stable=True)
    tiles = -(-parts[0].values.shape[0] // TILE_ROWS)
    counts = torch.bincount(row, minlength=tiles * TILE_ROWS)
    rank = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    chunks = (counts.view(tiles, TILE_ROWS).amax(1) + 15) // 16
    first = 16 * (chunks.cumsum(0) - chunks)
    at = (first[row // TILE_ROWS] + rank) * TILE_ROWS + row % TILE_ROWS
    total = int(16 * TILE_ROWS * chunks.sum())
    words = torch.zeros(total, dtype=torch.int16, device=row.device)
    scales = torch.zeros(total, dtype=torch.float16, device=row.device)
    words[at], scales[at] = col[order].to(torch.int16), value[order].half()
    sizes = chunks.tolist()
    zeros = scales.new_zeros(total, dtype=torch.uint8).view(-1, TILE_ROWS)
    return [
        _Run(
            SPARSE,
            0,
            sizes,
            words.view(-1, 16 * TILE_ROWS),
            scales.view(-1, TILE_ROWS),
            zeros,
            [16 * n for n in sizes],
            0,
        )
    ]


def _stream(bands: Sequence[_Band], programs: int, device: torch.device) -> tuple[Tensor, ...]:
    """The first seven tensors of a `SliceMatrix`."""
    runs = [run for band in bands for run in band.runs]
    total = sum(2 * run.words.numel() for run in runs)
    shares = max(1, min(programs, total // _LEAST_SHARE))
    pieces: list[list[int]] = []
    starts: list[int] = []
    tiles: list[int] = [0]
    words_at = scale_at = position = 0
    for band in bands:
        word_of, scale_of = [], []
        for run in band.runs:
            word_of.append(words_at)
            scale_of.append(scale_at)
            words_at += run.words.numel() // CHUNK
            scale_at += run.scales.shape[0]
        for tile in range(len(band.runs[0].chunks)):
            for number, run in enumerate(band.runs):
                count, bytes_each = run.chunks[tile], 2 * run.words.shape[1]
                marks = []
                while len(starts) + len(marks) < shares:
                    mark = total * (len(starts) + len(marks)) / shares - position
                    if mark >= count * bytes_each:
                        break
                    marks.append(round(mark / bytes_each))
                cuts = sorted({0, count, *marks})
                starts += [len(pieces) + cuts.index(mark) for mark in marks]
                book = scale_of[number] + run.scale_rows[tile] - run.books
                for begin, end in pairwise(cuts):
                    skipped = 16 * begin if run.kind == SPARSE else 0
                    within = 0 if run.kind == SPARSE else begin * fields_of(run.kind)
                    pieces.append([
                        run.kind, word_of[number] + begin * run.words.shape[1] // CHUNK, scale_of[number] + skipped,
                        run.first_slice + within, within, end - begin, book, len(tiles) - 1,
                    ])  # fmt: skip
                word_of[number] += count * run.words.shape[1] // CHUNK
                scale_of[number] += run.scale_rows[tile]
                position += count * bytes_each
            tiles.append(len(pieces))
    starts += [len(pieces)] * (shares + 1 - len(starts))
    tables = [torch.tensor(table, dtype=torch.int32, device=device) for table in (pieces, starts, tiles)]
    order = torch.cat([F.pad(band.rows, (0, -len(band.rows) % TILE_ROWS), value=-1) for band in bands])
    return (
        torch.cat([run.words.reshape(-1) for run in runs]),
        torch.cat([run.scales for run in runs]),
        torch.cat([run.zeros for run in runs]),
        *tables,
        order.view(-1, TILE_ROWS).to(device=device, dtype=torch.int32),
    )
