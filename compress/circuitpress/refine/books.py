"""Learnable codebooks: every weight is a point between the values of its book, and books and scales move too.

A weight is rounded to the nearest value of its book. Its gradient goes to the point, as if there were no rounding, and
to the value that was chosen; points are kept in units of the book's mean spacing.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..formats import BookCodes, CodebookFormat
from .soft import Soft, spread, straight_through


class SoftBook(Soft):
    """Points [rows, cols], books [books, 2**bits] and, where there are any, log sizes of scales are learned."""

    def __init__(self, form: CodebookFormat, value: BookCodes) -> None:
        super().__init__()
        self.form = form
        self._format, self._size = form, form.group_size or value.codes.shape[1]
        books = value.books.float()
        spacing = (books.amax(1) - books.amin(1)).clamp(min=2.0**-24) / (books.shape[1] - 1)
        owners = form.owners(value.codes.shape[0]).to(books.device)
        self.register_buffer("owners", owners)
        self.register_buffer("spacing", spacing[:, None])
        self.register_buffer("signs", value.scales.float().sign())
        self.books = nn.Parameter(books / self.get_buffer("spacing"))
        self.points = nn.Parameter(self.books.detach()[owners].gather(1, value.codes.long()))
        self.log_scale = nn.Parameter(value.scales.float().abs().log(), requires_grad=form.group_size > 0)

    def codes(self) -> list[nn.Parameter]:
        """The points, in spacings."""
        return [self.points]

    def scales(self) -> list[nn.Parameter]:
        """The books, in spacings, and log sizes of scales."""
        return [self.books, self.log_scale] if self._format.group_size else [self.books]

    def weight(self) -> Tensor:
        """book[nearest code] * scale."""
        spacing = self.get_buffer("spacing")
        books = straight_through(self.books * spacing, torch.Tensor.half) / spacing
        codes = self._codes()
        owners = self.get_buffer("owners")
        chosen = _Nearest.apply(self.points, books[owners], codes)
        weight: Tensor = chosen * spacing[owners]  # pyright: ignore[reportOperatorIssue]
        return weight * spread(self._scales(), self._size, weight.shape[1]) if self._format.group_size else weight

    @torch.no_grad()
    def value(self) -> BookCodes:
        """Nearest codes, books and scales as they are stored."""
        books = (self.books * self.get_buffer("spacing")).half()
        return BookCodes(self._codes().to(torch.uint8), books, self._scales().half())

    @torch.no_grad()
    def _codes(self) -> Tensor:
        """int64 [rows, cols]: the first of the nearest values; one at a time, which needs no [rows, cols, values]."""
        owners = self.get_buffer("owners")
        best = torch.full_like(self.points, torch.inf)
        codes = torch.zeros_like(self.points, dtype=torch.long)
        for code in range(self.books.shape[1]):
            distance = (self.points - self.books[owners, code, None]).abs()
            closer = distance < best
            best, codes = torch.where(closer, distance, best), codes.masked_fill(closer, code)
        return codes

    def _scales(self) -> Tensor:
        signs = self.get_buffer("signs")
        return straight_through(self.log_scale.exp() * signs, self._format.round_scales)


class _Nearest(torch.autograd.Function):
    """The value [rows, cols] that each point chose from its row's book [rows, values]."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, points: Tensor, books: Tensor, codes: Tensor
    ) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.shape = books.shape
        del points
        return books.gather(1, codes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (codes,) = ctx.saved_tensors
        return gradient, gradient.new_zeros(ctx.shape).scatter_add_(1, codes, gradient), None
