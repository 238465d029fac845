"""Codebooks: which values a matrix should be made of, and which of them every weight takes (LNQ).

Kim et al. 2025 (arXiv 2505.07004, algorithm 2) alternate two exact steps on tr(E H E^T); scales make it three:

1. Start: the values of a book cut the weights, divided by the rms of their group, into parts of equal weight on the
   diagonal of H, and Lloyd's iteration settles them. A GPTQ pass with that book gives the first codes and scales.
2. Given codes and scales the error is a quadratic form in the values of a book: with P the one-hot codes [cols, 2^b] of
   a row times its scales, the best book solves (sum_rows P^T H P) book = sum_rows P^T H w, one small system a book.
3. Given the books, coordinate descent (polish.py) chooses codes and the scale of every group again.

The least error of all rounds is kept: storing books in float16 and singular systems can raise it. What a book of a
whole segment needs is estimated on a sample of its rows.

KL of uniform plans, against integers with 6-bit scales in groups of 64, which take 0.02 to 0.05 bits more: -22, -11 and
-3 % on stories260K at 2, 3 and 4 bits, -7 % on babyllama-105 at 3. One book a row costs more than it gains below some
thousand columns; one for 16 rows lowers KL by 1 % for 0.02 bits.
"""

from typing import Self

import torch
from torch import Tensor

from ..formats import BookCodes, CodebookFormat
from ..formats.scales import round_scales, shared_exponents
from .feedback import round_columns
from .polish import DAMPING, Block, Grids, as_float16, polish

ROUNDS = 3
"""Books are solved for so often; three times more lower the error by another 0.3 %."""
_SWEEPS = 2
SAMPLE = 256
"""Rows on which a book is learned."""
_LLOYD = 20
_FACTORS = (0.75, 0.87, 1.0, 1.15, 1.35)
"""Sizes, relative to the rms of a group, that its scale may take at first."""
_CHUNK = 1 << 24
"""Elements of one-hot codes at a time."""


class BookGrids(Grids):
    """Books and scales of a matrix [rows, cols] while it is rounded (transposed, as in `AffineGrids`)."""

    def __init__(self, books: Tensor, scales: Tensor, tops: Tensor | None) -> None:
        """`books` [rows, 2^b] in rising order, `scales` [groups, rows], `tops` [rows] their exponents (None: fixed)."""
        self.books, self.scales, self.tops = books, scales, tops
        self.kept = [None] * len(scales)
        self._middles = (books[:, 1:] + books[:, :-1]).T.div(2)

    def rows(self, index: Tensor) -> Self:
        """The grids of some rows, as a copy."""
        tops = None if self.tops is None else self.tops[index]
        return type(self)(self.books[index], self.scales[:, index], tops)

    @property
    def learned(self) -> list[Tensor]:
        """What is changed in place, each [groups, rows]."""
        return [self.scales]

    def fit(self, group: int, target: Tensor, importance: Tensor, free: Tensor | None) -> None:
        """Chooses the scale of a group, and its sign, from a few candidates."""
        del free
        if self.tops is None:
            return
        size = (importance @ target.square() / importance.sum()).sqrt()
        best, scale = torch.full_like(size, torch.inf), size
        for factor in (sign * factor for sign in (1, -1) for factor in _FACTORS):
            s = round_scales(size * factor, self.tops, signed=True)
            error = importance @ (self._nearest(target, s)[1] - target).square_()
            better = error < best
            best, scale = torch.where(better, error, best), torch.where(better, s, scale)
        self.scales[group] = scale

    def nearest(self, group: int, target: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and values nearest to `target` [rows]."""
        code, value = self._nearest(target[None], self.scales[group])
        return code[0], value[0]

    def refit(self, group: int, codes: Tensor, block: Block) -> Tensor:
        """The scale with the least error for `codes` [width, rows], if that is below the present one's."""
        entries = self.entries(codes)
        scale = self.scales[group]
        if self.tops is None:
            return entries * scale
        square = (entries * (block.hessian @ entries)).sum(0)
        along = (entries * block.pull).sum(0)
        new = round_scales((along / square).nan_to_num_(0, 0, 0), self.tops, signed=True)
        better = new * (new * square - 2 * along) < scale * (scale * square - 2 * along)
        self.scales[group] = torch.where(better, new, scale)
        return entries * self.scales[group]

    def entries(self, codes: Tensor) -> Tensor:
        """The books' values for `codes` [width, rows], without scales."""
        return self.books.gather(1, codes.T.long()).T

    def _nearest(self, target: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and values for `target` [width, rows] and `scale` [rows]."""
        codes = (target / scale > self._middles[:, None]).sum(0)
        return codes.float(), self.entries(codes) * scale


def round_codebook(weight: Tensor, hessian: Tensor, form: CodebookFormat, *, polished: bool) -> tuple[BookCodes, str]:
    """Rounds `weight` [rows, cols] to `form`; the string says how the factorisation of H was rescued.

    `hessian` is float32 [cols, cols]. Without `polished` there is one round of step 2 and no step 3, as pricing wants.
    """
    rows, cols = weight.shape
    width = form.group_size or cols
    bounds = [(at, min(at + width, cols)) for at in range(0, cols, width)]
    damped, target = _damped(hessian), weight.T.float().contiguous()
    owners = form.owners(rows).to(weight.device)
    scales, tops = _first_scales(target, damped.diagonal(), bounds, scaled=form.group_size > 0)
    spread = _spread(scales, bounds)
    books = _first_books(target / spread, damped.diagonal()[:, None] * spread**2, form, owners)
    grids = BookGrids(books[owners], scales, tops)
    rounded, _, fallback = round_columns(weight, hessian, bounds, grids)
    codes, least, best = rounded.float(), torch.inf, None
    polished = polished and not fallback
    for _ in range(ROUNDS if polished else 1):
        books, codes = _solve_books(target, damped, codes, _spread(grids.scales, bounds), books, owners)
        grids = BookGrids(books[owners], grids.scales, tops)
        values = grids.entries(codes) * _spread(grids.scales, bounds)
        if polished:
            polish(target, hessian, bounds, codes, values, grids, sweeps=_SWEEPS)
        error = values - target
        loss = float((error * (damped @ error)).sum())
        if best is None or loss < least:
            stored = (codes.T.to(torch.uint8).contiguous(), books.half(), grids.scales.T.half().contiguous())
            least, best = loss, BookCodes(*stored)
    assert best is not None
    return best, fallback


def _damped(hessian: Tensor) -> Tensor:
    """The Hessian that errors are weighed with; without a usable one, all columns count alike."""
    if bool(hessian.isfinite().all()) and float(hessian.diagonal().sum()) > 0:
        damped = hessian.float().clone()
        damped.diagonal().add_(DAMPING * damped.diagonal().mean())
        return damped
    return torch.eye(len(hessian), device=hessian.device)


def _spread(scales: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
    """[groups, rows] to [cols, rows]"""
    return scales.repeat_interleave(torch.tensor([stop - start for start, stop in bounds], device=scales.device), 0)


def _first_scales(
    weight: Tensor, importance: Tensor, bounds: list[tuple[int, int]], *, scaled: bool
) -> tuple[Tensor, Tensor | None]:
    """The weighted rms [groups, rows] of all groups, as it can be stored, and the shared exponents [rows]."""
    if not scaled:
        return torch.ones(1, weight.shape[1], device=weight.device), None
    parts = [(weight[start:stop], importance[start:stop]) for start, stop in bounds]
    size = torch.stack([(share @ part.square() / share.sum()).sqrt() for part, share in parts])
    tops = shared_exponents(max(_FACTORS) * size.T)[:, 0]
    return round_scales(size, tops, signed=True), tops


def _first_books(relative: Tensor, importance: Tensor, form: CodebookFormat, owners: Tensor) -> Tensor:
    """Weighted quantiles and Lloyd's iteration: float32 [books, 2^b] in rising order from [cols, rows]."""
    if not form.share:
        index = _sample(torch.arange(len(owners), device=owners.device))
        return _settle(relative[:, index].reshape(1, -1), importance[:, index].reshape(1, -1), 2**form.bits)
    missing = -len(owners) % form.share
    # Rows that fill up the last book count for nothing.
    values = torch.nn.functional.pad(relative.T, (0, 0, 0, missing)).reshape(-1, form.share * len(relative))
    share = torch.nn.functional.pad(importance.T, (0, 0, 0, missing)).reshape(values.shape)
    step = max(1, _CHUNK // values.shape[1])
    pairs = zip(values.split(step), share.split(step), strict=True)
    return torch.cat([_settle(*pair, 2**form.bits) for pair in pairs])


def _settle(values: Tensor, importance: Tensor, size: int) -> Tensor:
    """Books float32 [books, size] of `values` [books, n] with weights of the same shape."""
    values, order = values.contiguous().sort(1)
    share = importance.gather(1, order).double()
    total, moment = share.cumsum(1), (share * values).cumsum(1)
    middle = (torch.arange(size, device=values.device) + 0.5) / size
    at = torch.searchsorted(total, middle * total[:, -1:]).clamp(max=values.shape[1] - 1)
    entries = values.gather(1, at)
    for _ in range(_LLOYD):
        # Sorted values make the cells intervals: sums over them are differences of running sums.
        edges = torch.searchsorted(values, ((entries[:, 1:] + entries[:, :-1]) / 2).contiguous())
        ends = torch.nn.functional.pad(edges, (0, 1), value=values.shape[1]) - 1
        sums, moments = (
            torch.where(ends >= 0, running.gather(1, ends.clamp(min=0)), 0).diff(
                prepend=running.new_zeros(len(ends), 1)
            )
            for running in (total, moment)
        )
        entries = torch.where(sums > 0, moments / sums, entries.double()).float().sort(1).values
    return as_float16(entries)


def _solve_books(
    weight: Tensor, hessian: Tensor, codes: Tensor, scales: Tensor, books: Tensor, owners: Tensor
) -> tuple[Tensor, Tensor]:
    """Step 2: the best books [books, 2^b] for codes and scales [cols, rows]; returns them, rising, and the codes."""
    count, size = books.shape
    square = torch.zeros(count, size, size, device=weight.device)
    pull = torch.zeros(count, size, device=weight.device)
    index = torch.arange(len(owners), device=weight.device)
    for rows in (_sample(index) if count == 1 else index).split(max(1, _CHUNK // (size * len(weight)))):
        hot = torch.nn.functional.one_hot(codes[:, rows].T.long(), size).float() * scales[:, rows].T[:, :, None]
        curved = hessian @ hot
        square.index_add_(0, owners[rows], hot.mT @ curved)
        pull.index_add_(0, owners[rows], (curved * weight[:, rows].T[:, :, None]).sum(1))
    # The difference from the present books, with a ridge that leaves values alone that no weight takes.
    ridge = 1e-6 * square.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + torch.finfo(torch.float32).tiny
    missing = pull - (square @ books[:, :, None])[:, :, 0]
    step = torch.linalg.solve_ex((square + ridge * torch.eye(size, device=weight.device)).double(), missing.double())[0]
    new = books + step.float().nan_to_num_(0, 0, 0)
    new, order = as_float16(new).sort(1)
    return new, order.argsort(1)[owners].gather(1, codes.T.long()).T.float()


def _sample(rows: Tensor) -> Tensor:
    """At most `SAMPLE` of the rows, evenly spread."""
    return rows if len(rows) <= SAMPLE else rows[torch.linspace(0, len(rows) - 1, SAMPLE, device=rows.device).long()]
