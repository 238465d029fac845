"""Codebooks: Lloyd and least squares against plain loops, never worse for more rounds, and better than grids."""

import numpy as np
import pytest
import torch
from torch import Tensor

from circuitpress.formats import BookCodes, CodebookFormat, parse
from circuitpress.quantize import codebook, quantize_matrix
from circuitpress.quantize.codebook import BookGrids, round_codebook

from .test_feedback import correlated, loss, normal
from .test_polish import damped

NAMES = ["code2", "code3", "code4", "code2g16", "code3g16", "code2r4g16", "code3r5g64"]


def form_of(name: str) -> CodebookFormat:
    form = parse(name)
    assert isinstance(form, CodebookFormat)
    return form


@pytest.mark.parametrize("polished", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_values_can_be_stored(name: str, polished: bool) -> None:
    weight, hessian = normal(13, 45), correlated(45)
    form = form_of(name)
    value, note = round_codebook(weight, hessian, form, polished=polished)
    assert note == ""
    assert value.codes.shape == (13, 45) and int(value.codes.max()) < 2**form.bits
    assert value.books.shape == (form.books(13), 2**form.bits)
    assert bool((value.books.diff(dim=1) >= 0).all())
    again = form.unpack(form.pack(value), 13, 45)
    assert all(torch.equal(a, b) for a, b in zip(value, again, strict=True))
    assert bool(form.decode(value).isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_polish_lowers_the_error(name: str) -> None:
    for seed in range(3):
        weight, hessian = normal(13, 45, seed=seed), correlated(45, seed=seed)
        losses = [
            loss(weight, form_of(name).decode(round_codebook(weight, hessian, form_of(name), polished=p)[0]), hessian)
            for p in (False, True)
        ]
        assert losses[1] < 0.95 * losses[0]


def test_each_round_keeps_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = normal(13, 45), correlated(45)
    losses = []
    for rounds in range(1, 6):
        monkeypatch.setattr(codebook, "ROUNDS", rounds)
        value, _ = round_codebook(weight, hessian, form_of("code2g16"), polished=True)
        losses.append(loss(weight, form_of("code2g16").decode(value), damped(hessian)))
    assert all(after <= before * (1 + 1e-6) for before, after in zip(losses, losses[1:], strict=False))


@pytest.mark.parametrize("name", ["code2", "code2r4g16", "code3g16"])
def test_books_are_the_least_squares_of_their_codes(name: str) -> None:
    """Step 2 against numpy's solver on the whole design matrix, float64."""
    weight, hessian = normal(9, 30), correlated(30)
    form = form_of(name)
    value, _ = round_codebook(weight, hessian, form, polished=False)
    scales = value.scales.float().repeat_interleave(form.group_size or 30, 1)[:, :30]
    owners = form.owners(9)
    books, codes = codebook._solve_books(  # pyright: ignore[reportPrivateUsage]
        weight.T.contiguous(), damped(hessian), value.codes.T.float(), scales.T, value.books.float(), owners
    )
    root = np.linalg.cholesky(damped(hessian).double().numpy()).T
    for book in range(form.books(9)):
        design, wanted = [], []
        for row in (owners == book).nonzero()[:, 0].tolist():
            hot = np.zeros((30, 2**form.bits))
            hot[np.arange(30), value.codes[row].numpy()] = scales[row].numpy()
            design.append(root @ hot)
            wanted.append(root @ weight[row].double().numpy())
        best = np.linalg.lstsq(np.concatenate(design), np.concatenate(wanted), rcond=None)[0]
        np.testing.assert_allclose(books[book].numpy(), np.sort(best), rtol=2e-3, atol=2e-3)  # float16, ridge
    new = BookCodes(codes.T.to(torch.uint8), books.half(), value.scales)
    assert loss(weight, form.decode(new), damped(hessian)) <= loss(weight, form.decode(value), damped(hessian)) * 1.001


def slow_lloyd(values: Tensor, share: Tensor, size: int) -> list[float]:
    """20 rounds from weighted quantiles, in loops."""
    order = values.argsort()
    v, s = values[order].double().tolist(), share[order].double().tolist()
    entries, at, total = [], 0.0, sum(s)
    k = 0
    for value, weight in zip(v, s, strict=True):
        at += weight
        while k < size and at >= (k + 0.5) / size * total:
            entries.append(value)
            k += 1
    for _ in range(20):
        sums, moments = [0.0] * size, [0.0] * size
        for value, weight in zip(v, s, strict=True):
            nearest = min(range(size), key=lambda i: abs(value - entries[i]))
            sums[nearest] += weight
            moments[nearest] += weight * value
        entries = sorted(m / w if w else e for m, w, e in zip(moments, sums, entries, strict=True))
    return entries


@pytest.mark.parametrize("size", [4, 8])
def test_lloyd_is_the_plain_loop(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    values = torch.randn(3, 70, generator=generator)
    share = torch.rand(3, 70, generator=generator)
    found = codebook._settle(values, share, size)  # pyright: ignore[reportPrivateUsage]
    for row in range(3):
        np.testing.assert_allclose(found[row].numpy(), slow_lloyd(values[row], share[row], size), rtol=2e-3, atol=2e-3)


def test_the_nearest_entry_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    books = torch.randn(5, 8, generator=generator).sort(1).values
    scales = torch.tensor([[0.5, -2.0, 1.0, -0.25, 3.0]])
    grids = BookGrids(books, scales, torch.zeros(5))
    for _ in range(50):
        target = torch.randn(5, generator=generator) * 3
        codes, values = grids.nearest(0, target)
        entries = books * scales.T
        torch.testing.assert_close((values - target).abs(), (entries - target[:, None]).abs().amin(1))
        assert torch.equal(values, entries[torch.arange(5), codes.long()])


def test_a_shared_book_beats_grids_of_the_same_bytes_at_two_bits() -> None:
    """Normal weights of rows that differ in size: four learned levels a segment against four even ones a group."""
    weight = normal(64, 64) * torch.logspace(-0.4, 0.4, 64)[:, None]
    hessian = correlated(64)
    losses = {
        name: loss(weight, quantize_matrix(weight, hessian, "rows", [(name, 0, 64)]).decode(), hessian)
        for name in ("code2g64", "int2g64s6")
    }
    assert form_of("code2g64").nbytes(64, 64) < parse("int2g64s6").nbytes(64, 64)
    assert losses["code2g64"] < 0.97 * losses["int2g64s6"]


def test_without_a_hessian() -> None:
    weight = normal(6, 20)
    for broken in (torch.full((20, 20), torch.nan), torch.zeros(20, 20)):
        value, note = round_codebook(weight, broken, form_of("code3g16"), polished=True)
        assert note == "no usable Hessian: rounded to nearest"
        assert loss(weight, form_of("code3g16").decode(value), torch.eye(20)) < 0.06 * float(weight.square().sum())


@pytest.mark.parametrize("name", ["code2", "code2g16", "code3r4g16"])
@pytest.mark.parametrize("kind", ["zero", "constant", "tiny", "huge", "zero row"])
def test_degenerate_weights_stay_finite(name: str, kind: str) -> None:
    weight = {
        "zero": torch.zeros(9, 33),
        "constant": torch.full((9, 33), 0.37),
        "tiny": normal(9, 33) * 1e-8,
        "huge": normal(9, 33) * 1e4,
        "zero row": normal(9, 33).index_fill(0, torch.tensor([2, 5]), 0),
    }[kind]
    value, _ = round_codebook(weight, correlated(33), form_of(name), polished=True)
    decoded = form_of(name).decode(value)
    assert bool(decoded.isfinite().all())
    if kind == "constant":
        assert float((decoded - weight).abs().max()) < 0.01
