"""Rounding to trellis formats against an independent form of block feedback in float64, and what it must be worth."""

import pytest
import torch
from torch import Tensor

from circuitpress.formats import TrellisCodes, TrellisFormat, parse
from circuitpress.formats.trellis import (
    STRIP,
    rotate_inputs,
    row_codes,
    row_scales,
    strip_codes,
    strip_scales,
)
from circuitpress.quantize import gptq
from circuitpress.quantize.trellis import round_trellis
from circuitpress.quantize.viterbi import encode


def form_of(name: str) -> TrellisFormat:
    form = parse(name)
    assert isinstance(form, TrellisFormat)
    return form


def correlated(cols: int, *, tokens: int = 400, seed: int = 0) -> Tensor:
    """A Hessian [cols, cols] of strongly correlated inputs whose columns differ in scale."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(max(3, cols // 3), cols, generator=generator)
    x = torch.randn(tokens, basis.shape[0], generator=generator) @ basis
    x = (x + 0.3 * torch.randn(tokens, cols, generator=generator)) * torch.rand(cols, generator=generator).add(0.2)
    return x.T @ x / tokens


def normal(rows: int, cols: int, *, seed: int = 1) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def loss(weight: Tensor, found: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T)."""
    error = weight.double() - found.double()
    return float((error @ hessian.double() * error).sum())


def visiting_order(hessian: Tensor) -> list[int]:
    """Strips in reverse order of visiting: next is the one with the least variance given those before it."""
    order: list[int] = []
    columns: list[int] = []
    count = len(hessian) // STRIP
    while len(order) < count:
        inverse = torch.linalg.inv(hessian[columns][:, columns])
        explained = hessian[:, columns] @ inverse @ hessian[columns]
        variance = (hessian - explained).diagonal().view(count, STRIP).mean(1)
        variance[order] = torch.inf
        order.append(int(variance.argmin()))
        columns += range(order[-1] * STRIP, (order[-1] + 1) * STRIP)
    return order


def reference(weight: Tensor, hessian: Tensor, form: TrellisFormat) -> Tensor:
    """Weights in the basis of the codes before rows are refitted: targets and costs from Schur complements."""
    w = rotate_inputs(weight.double())
    h = rotate_inputs(rotate_inputs(hessian.double()).T)
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    rows = row_scales(*row_codes(w.square().mean(1).sqrt().float())).double()[:, None]
    error = torch.zeros_like(w)
    order = visiting_order(h)
    for place in reversed(range(len(order))):
        own, before, after = (
            [c for strip in part for c in range(strip * STRIP, strip * STRIP + STRIP)]
            for part in (order[place : place + 1], order[:place], order[place + 1 :])
        )
        through = torch.linalg.solve(h[before][:, before], h[before][:, own])  # what earlier columns will make up for
        metric = h[own][:, own] - h[own][:, before] @ through
        shift = error[:, after] @ (h[after][:, own] - h[after][:, before] @ through)
        target = (w[:, own] + torch.linalg.solve(metric, shift.T).T) / rows
        cost = metric.diagonal() * rows.square()
        scale = strip_scales(strip_codes(1.1 * ((cost * target.square()).mean() / cost.mean()).sqrt()))
        rings = form.rings(target.numel())
        codes = encode(
            (target / scale).float().reshape(rings.count, -1),
            form.table(),
            code_bits=form.code_bits,
            weights=(cost / cost.mean()).float().reshape(rings.count, -1),
        )
        values = form.strip_values(codes, rows=len(w), strip=STRIP).double()
        fitted = (cost * target * values).sum() / (cost * values.square()).sum()
        error[:, own] = w[:, own] - rows * strip_scales(strip_codes(fitted)) * values
    return w - error


def test_it_is_block_feedback() -> None:
    weight, hessian = normal(64, 48), correlated(48)
    form = form_of("trellis2l10")
    (value,), note = round_trellis(weight, hessian, [form])
    assert note == ""
    # Rows' scales are refitted at the end: compare up to those.
    found, expected = form.decode_rotated(value).double(), reference(weight, hessian, form)
    scale = (found * expected).sum(1, keepdim=True) / expected.square().sum(1, keepdim=True)
    assert float((scale - 1).abs().max()) < 0.3
    # Numerical noise may tip a ring here and there, after which what is fed back differs.
    same = (found - scale * expected).abs() < 1e-3 * found.abs().amax(1, keepdim=True)
    assert same.float().mean() > 0.9
    turned = rotate_inputs(rotate_inputs(hessian).T)
    assert loss(rotate_inputs(weight), found, turned) < loss(rotate_inputs(weight), expected, turned)


@pytest.mark.parametrize(("rows", "cols"), [(64, 64), (172, 60), (33, 50), (1, 40), (2, 3), (257, 17), (5, 4)])
@pytest.mark.parametrize("name", ["trellis2l10", "trellis2.5l10"])
def test_any_shape(rows: int, cols: int, name: str) -> None:
    weight, hessian, form = normal(rows, cols), correlated(cols), form_of(name)
    (value,), _ = round_trellis(weight, hessian, [form])
    layout = {key: (t.dtype, t.numel()) for key, t in form.pack(value).items()}
    assert layout == form.layout(rows, cols)
    found = form.decode(value)
    assert found.shape == weight.shape
    allowed = 0.2 if weight.numel() > 100 else 0.7  # six weights share a ring of ten bits
    assert loss(weight, found, hessian) < allowed * loss(weight, torch.zeros_like(weight), hessian)


def test_more_bits_are_better_and_all_beat_integers() -> None:
    """At fewer bytes: groups of 48 take 0.42 bits a weight beside the codes, a trellis of 96 columns 0.11."""
    x = normal(400, 96) @ normal(96, 96, seed=3)
    weight, hessian = normal(96, 96, seed=5), x.T @ x / 400
    forms = [form_of(f"trellis{bits}l10") for bits in ("1.5", "2", "2.5", "3", "3.5", "4")]
    values, _ = round_trellis(weight, hessian, forms)
    losses = [loss(weight, form.decode(value), hessian) for form, value in zip(forms, values, strict=True)]
    assert losses == sorted(losses, reverse=True)
    for bits, mine in ((2, losses[1]), (3, losses[3]), (4, losses[5])):
        rounding = gptq(weight, hessian, [(0, 48), (48, 96)], torch.full((96, 2), 2**bits - 1))
        at = torch.arange(96) // 48
        integer = (rounding.codes.float() - rounding.zeros[:, at]) * rounding.scales.float()[:, at]
        assert mine < 0.8 * loss(weight, integer, hessian), bits


def test_feedback_and_outliers() -> None:
    """Feedback pays on correlated inputs, and an outlier costs the others next to nothing."""
    weight, hessian, form = normal(64, 64), correlated(64), form_of("trellis2l10")
    (fed,), _ = round_trellis(weight, hessian, [form])
    (plain,), _ = round_trellis(weight, torch.eye(64), [form])
    assert loss(weight, form.decode(fed), hessian) < 0.7 * loss(weight, form.decode(plain), hessian)
    spiked = weight.clone()
    spiked[3, 5] = 40.0
    (value,), _ = round_trellis(spiked, hessian, [form])
    others = [r for r in range(64) if r != 3]
    assert loss(spiked[others], form.decode(value)[others], hessian) < 1.1 * loss(
        weight[others], form.decode(fed)[others], hessian
    )


def test_forms_do_not_influence_each_other() -> None:
    weight, hessian = normal(40, 32), correlated(32)
    forms = [form_of("trellis2l10"), form_of("trellis3l10")]
    together, _ = round_trellis(weight, hessian, forms)
    for form, value in zip(forms, together, strict=True):
        (alone,), _ = round_trellis(weight, hessian, [form])
        assert equal(alone, value)


def equal(a: TrellisCodes, b: TrellisCodes) -> bool:
    return a.shape == b.shape and all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))


@pytest.mark.parametrize("hessian", [torch.zeros(20, 20), torch.full((20, 20), float("nan"))])
def test_without_a_hessian_weights_are_rounded_as_they_are(hessian: Tensor) -> None:
    weight, form = normal(32, 20), form_of("trellis3l10")
    (value,), note = round_trellis(weight, hessian, [form])
    assert note == "no usable Hessian: rounded to nearest"
    assert loss(weight, form.decode(value), torch.eye(20)) < 0.03 * float(weight.square().sum())


def test_a_singular_hessian_zeros_and_half_precision() -> None:
    x = normal(3, 40)
    weight, form = normal(32, 40), form_of("trellis2l10")
    weight[7] = 0
    (value,), _ = round_trellis(weight.bfloat16(), x.T @ x, [form])
    found = form.decode(value)
    assert bool(found.isfinite().all())
    assert float(found[7].abs().max()) < 0.02
    (nothing,), _ = round_trellis(torch.zeros(16, 40), x.T @ x, [form])
    assert float(form.decode(nothing).abs().max()) < 1e-5
