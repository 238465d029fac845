"""Codebooks: the 2^bits values that a code can stand for are learned, and stored as float16.

    w[r, c] = book[r // share, code[r, c]] * scale[r, c // group_size]

| name | book | scales | beside the codes, bits a weight at 384 x 384 (2 / 3 / 4 bits) |
|---|---|---|---|
| `code3` | one a row | none | 0.17 / 0.33 / 0.67 |
| `code3g64` | one a segment | 6 bits with sign, for 64 columns | 0.10 / 0.10 / 0.10 |
| `code3r16g64` | one for 16 rows | 6 bits with sign, for 64 columns | 0.11 / 0.12 / 0.14 |

Codes are one bit stream, as in integer.py; scales are those of scales.py. Decoding is one look-up in a table of at most
16 values, no dearer than an integer's grid (Kim et al. 2025, arXiv 2505.07004, measured that on a GPU).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import scales as small
from .base import Format, pack_bits, packed_size, unpack_bits


class BookCodes(NamedTuple):
    """A segment in codebooks; formats without scales have scales of one."""

    codes: Tensor
    """uint8 [rows, cols]"""
    books: Tensor
    """float16 [ceil(rows / share), 2**bits]"""
    scales: Tensor
    """float16 [rows, groups]"""


@dataclass(frozen=True)
class CodebookFormat(Format):
    """`bits` a weight; a book for `share` rows (0: all rows); scales for `group_size` columns (0: none)."""

    bits: int
    share: int = 1
    group_size: int = 0

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Such as `code3`, `code3g64` or `code3r16g64`."""
        share = f"r{self.share}" if self.share and self.group_size else ""
        return f"code{self.bits}{share}" + (f"g{self.group_size}" if self.group_size else "")

    def groups(self, cols: int) -> int:
        """Groups in a row of `cols` columns; one that means nothing where there are no scales."""
        return -(-cols // self.group_size) if self.group_size else 1

    def books(self, rows: int) -> int:
        """Books of a segment of `rows` rows."""
        return -(-rows // self.share) if self.share else 1

    def owners(self, rows: int) -> Tensor:
        """The book of every row, int64 [rows]."""
        return torch.arange(rows) // self.share if self.share else torch.zeros(rows, dtype=torch.long)

    def layout(self, rows: int, cols: int) -> dict[str, tuple[torch.dtype, int]]:
        """Codes under `weight`, then `books` and, if there are scales, `small_scales` and `exponents`."""
        layout = {
            "weight": (torch.uint8, packed_size(rows * cols, self.bits)),
            "books": (torch.float16, self.books(rows) * 2**self.bits),
        }
        if self.group_size:
            layout["small_scales"] = (torch.uint8, packed_size(rows * self.groups(cols), small.BITS))
            layout["exponents"] = (torch.int8, -(-rows // small.ROWS))
        return layout

    def round_scales(self, scales: Tensor) -> Tensor:
        """The nearest scales [rows, groups] that this format can store, float16; ones where it has none."""
        if not self.group_size:
            return torch.ones_like(scales, dtype=torch.float16)
        return small.round_scales(scales, small.shared_exponents(scales), signed=True).half()

    def pack(self, value: BookCodes) -> dict[str, Tensor]:
        """The flat tensors of `layout`."""
        packed = {"weight": pack_bits(value.codes, self.bits), "books": value.books.reshape(-1).contiguous()}
        if self.group_size:
            codes, packed["exponents"] = small.pack_scales(value.scales, signed=True)
            packed["small_scales"] = pack_bits(codes, small.BITS)
        return packed

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, cols: int) -> BookCodes:
        """The inverse of `pack`."""
        books = tensors["books"].reshape(-1, 2**self.bits)
        if self.group_size:
            codes = unpack_bits(tensors["small_scales"], small.BITS, (rows, self.groups(cols)))
            scales = small.unpack_scales(codes, tensors["exponents"], signed=True)
        else:
            scales = torch.ones(rows, 1, dtype=torch.float16, device=books.device)
        return BookCodes(unpack_bits(tensors["weight"], self.bits, (rows, cols)), books, scales)

    def decode(self, value: BookCodes) -> Tensor:
        """float32 [rows, cols]."""
        rows, cols = value.codes.shape
        book = value.books.float()[self.owners(rows).to(value.books.device)]
        weight = book.gather(1, value.codes.long())
        width = self.group_size or cols
        return weight.mul_(value.scales.float().repeat_interleave(width, dim=1)[:, :cols])
