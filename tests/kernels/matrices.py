"""Matrices of any mixture of formats for the tests of slices, with the weights that they stand for in float64."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from circuitpress_kernels import BOOK, DENSE, Part, lay_out
from circuitpress_kernels.slices import TRELLIS, SliceMatrix, bits_of, memory_of, width_of
from circuitpress_kernels.trellis import SPREAD, trellis_values

KINDS = (2, 3, 4, 5, 6, 8, DENSE, BOOK + 2, BOOK + 3, BOOK + 4)
RINGS = tuple(range(TRELLIS + 3, TRELLIS + 9))
"""1.5 to 4 bits on a trellis: rows come in 32, columns in 4."""
WHOLE = 1 << 20
"""A group size that makes a row one group."""


class Cut(NamedTuple):
    """A part: `length` rows or columns of a kind, in groups, with so many outliers."""

    length: int
    kind: int
    group: int = 32
    outliers: int = 0


def part(cut: Cut, start: int, rows: int, cols: int) -> tuple[Part, Tensor]:
    """A random part [rows, cols] and its weights in float64."""
    if cut.kind == DENSE:
        weight = torch.randn(rows, cols).bfloat16().half()  # exact in both
        return Part(start, DENSE, weight), weight.double()
    if cut.kind > TRELLIS:
        return rings(cut.kind, start, rows, cols)
    reach = min(cut.group, cols)
    bits = cut.kind - BOOK if cut.kind > DENSE else cut.kind
    codes = torch.randint(0, 2**bits, (rows, cols), dtype=torch.uint8)
    scales = (0.01 + torch.rand(rows, -(-cols // reach)) * 0.1).half()
    column = torch.arange(cols) // reach
    if cut.kind > DENSE:
        books = torch.randn(rows, 2**bits).half()
        weight = books.double().gather(1, codes.long()) * scales.double()[:, column]
        return Part(start, cut.kind, codes, cut.group, scales, books=books), weight
    zeros = torch.randint(0, 2**bits, scales.shape, dtype=torch.uint8)
    weight = (codes.double() - zeros.double()[:, column]) * scales.double()[:, column]
    outliers = None
    if cut.outliers:
        positions = torch.randperm(rows * cols)[: cut.outliers].sort().values
        values = torch.randn(len(positions)).half()
        weight.view(-1)[positions] = values.double()
        outliers = (positions, values)
    return Part(start, cut.kind, codes, cut.group, scales, zeros, outliers=outliers), weight


def rings(kind: int, start: int, rows: int, cols: int) -> tuple[Part, Tensor]:
    """A random part on a trellis: a ring is 32 rows by 4 columns, row after row."""
    bits, width = bits_of(kind), width_of(kind)
    codes = torch.randint(0, 2**bits, (rows // 32, cols // 4, 128 // width), dtype=torch.uint8)
    values = trellis_values(codes.view(-1, 128 // width), code_bits=bits, memory=memory_of(kind), width=width)
    scales = (0.01 + torch.rand(rows, 1) * 0.1).half()
    placed = torch.zeros(rows // 32, cols // 4, 128, dtype=torch.uint8)
    placed[:, :, ::width] = codes

    def spread(by_ring: Tensor) -> Tensor:
        return by_ring.view(rows // 32, cols // 4, 32, 4).transpose(1, 2).reshape(rows, cols)

    return Part(start, kind, spread(placed), 0, scales), spread(values).double() * scales.double() / SPREAD


def matrix(
    axis: str, across: int, cuts: Sequence[Cut], *, dtype: torch.dtype = torch.float16, programs: int = 7, seed: int = 0
) -> tuple[SliceMatrix, Tensor]:
    """The laid-out matrix of parts along `axis`, `across` the other way, and its weights in float64."""
    torch.manual_seed(seed)
    parts, weights, start = [], [], 0
    for cut in cuts:
        made, weight = part(cut, start, *((cut.length, across) if axis == "rows" else (across, cut.length)))
        parts.append(made)
        weights.append(weight)
        start += cut.length
    rows, cols = (start, across) if axis == "rows" else (across, start)
    laid_out = lay_out(parts, axis=axis, rows=rows, cols=cols, dtype=dtype, programs=programs)
    return laid_out, torch.cat(weights, 0 if axis == "rows" else 1)
