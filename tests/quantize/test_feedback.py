"""GPTQ with an LDL factor against the textbook form: the Cholesky factor of the inverse Hessian, column by column."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from circuitpress.quantize import gptq

Array = NDArray[np.float64]


def correlated(cols: int, *, tokens: int = 300, seed: int = 0) -> Tensor:
    """A Hessian [cols, cols] of strongly correlated inputs whose columns differ in scale."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(max(3, cols // 3), cols, generator=generator)
    x = torch.randn(tokens, basis.shape[0], generator=generator) @ basis
    x = (x + 0.3 * torch.randn(tokens, cols, generator=generator)) * torch.rand(cols, generator=generator).add(0.2)
    return x.T @ x / tokens


def normal(rows: int, cols: int, *, seed: int = 1) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def fit(target: Array, importance: Array, maxq: int) -> tuple[float, float]:
    """Scale and zero of one row's group: the best of 7 ranges and of 4 around it, in plain loops."""
    found = [_attempt(target, importance, maxq, factor) for factor in np.linspace(1.0, 0.4, 7)]
    centre = min(found, key=lambda entry: entry[0])[1]
    found += [_attempt(target, importance, maxq, centre + step) for step in (-0.05, -0.025, 0.025, 0.05)]
    return min(found, key=lambda entry: entry[0])[2:]


def _attempt(target: Array, importance: Array, maxq: int, factor: float) -> tuple[float, float, float, float]:
    """Error, factor, scale and zero."""
    low, high = min(target.min(), 0.0), max(target.max(), 0.0)
    s = float(np.float16(max((high - low) * factor / maxq, 2.0**-24)))
    z = float(np.clip(np.round(-low * factor / s), 0, maxq))
    error = 0.0
    for value, weight in zip(target, importance, strict=True):
        error += weight * ((np.clip(np.round(value / s + z), 0, maxq) - z) * s - value) ** 2
    return error, float(factor), s, z


def textbook(
    weight: Array, hessian: Array, bounds: Sequence[tuple[int, int]], maxq: NDArray[np.int64], damping: float = 0.01
) -> tuple[Array, Array, Array]:
    """Codes [rows, cols], scales and zeros [rows, groups] by arXiv 2210.17323, algorithm 1, in float64.

    With (H + lambda I)^-1 = U^T U, U upper triangular, in the order of visiting: round column i, divide its error by
    U_ii and subtract it times U_ij from every later column j. Groups are visited by falling mean of the diagonal of H,
    columns of a group by falling diagonal. A column's share in the fit of the grid is 1 / U_ii^2, what an error costs
    once the later columns have made up for it.
    """
    diagonal = np.diag(hessian)
    groups = sorted(range(len(bounds)), key=lambda g: -diagonal[slice(*bounds[g])].mean())
    order = [c for g in groups for c in sorted(range(*bounds[g]), key=lambda c: -diagonal[c])]
    damped = hessian[np.ix_(order, order)] + damping * diagonal.mean() * np.eye(len(order))
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    work = weight[:, order].copy()
    codes = np.zeros(weight.shape)
    scales, zeros = (np.zeros((weight.shape[0], len(bounds))) for _ in range(2))
    i = 0
    for g in groups:
        width = bounds[g][1] - bounds[g][0]
        share = 1 / np.diag(upper)[i : i + width] ** 2
        for row in range(weight.shape[0]):
            if maxq[row, g]:
                scales[row, g], zeros[row, g] = fit(work[row, i : i + width], share, int(maxq[row, g]))
        for k in range(i, i + width):
            rounded = weight[:, order[k]].copy()
            for row in np.flatnonzero(maxq[:, g]):
                code = np.clip(np.round(work[row, k] / scales[row, g] + zeros[row, g]), 0, maxq[row, g])
                codes[row, order[k]] = code
                rounded[row] = (code - zeros[row, g]) * scales[row, g]
            # A kept weight is stored as it was: its error is what the earlier columns had pushed into it.
            work[:, k + 1 :] -= np.outer((work[:, k] - rounded) / upper[k, k], upper[k, k + 1 :])
        i += width
    return codes, scales, zeros


def dequantise(codes: Tensor, scales: Tensor, zeros: Tensor, bounds: Sequence[tuple[int, int]]) -> Tensor:
    column = torch.cat([torch.full((stop - start,), g) for g, (start, stop) in enumerate(bounds)])
    return (codes.double() - zeros.double()[:, column]) * scales.double()[:, column]


def loss(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T)"""
    error = weight.double() - rounded.double()
    return float((error @ hessian.double() * error).sum())


BOUNDS = [(0, 7), (7, 16), (16, 17), (17, 30)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_those_of_the_textbook(bits: int, seed: int) -> None:
    weight, hessian = normal(6, 30, seed=seed), correlated(30, seed=seed + 10)
    maxq = torch.full((6, 4), 2**bits - 1)
    result = gptq(weight, hessian, BOUNDS, maxq)
    codes, scales, zeros = textbook(weight.double().numpy(), hessian.double().numpy(), BOUNDS, maxq.numpy())
    assert result.fallback == ""
    # float32 against float64: a target would have to lie within 1e-6 of the middle of two codes to differ.
    np.testing.assert_array_equal(result.scales.numpy(), scales)
    np.testing.assert_array_equal(result.zeros.numpy(), zeros)
    np.testing.assert_array_equal(result.codes.numpy(), codes)


def test_rows_of_several_widths_and_kept_groups() -> None:
    """Each row has its own largest code in each group; 0 keeps the group, and its errors are not passed on."""
    weight, hessian = normal(5, 30), correlated(30)
    maxq = torch.tensor([[3, 7, 15, 255], [0, 7, 7, 7], [7, 0, 7, 3], [15, 15, 0, 0], [255, 3, 3, 0]])
    result = gptq(weight, hessian, BOUNDS, maxq)
    codes, scales, zeros = textbook(weight.double().numpy(), hessian.double().numpy(), BOUNDS, maxq.numpy())
    rounded = maxq.numpy() > 0
    column = np.repeat(np.arange(4), [7, 9, 1, 13])
    np.testing.assert_array_equal(np.where(rounded, result.scales.numpy(), 0), scales)
    np.testing.assert_array_equal(np.where(rounded, result.zeros.numpy(), 0), zeros)
    np.testing.assert_array_equal(np.where(rounded[:, column], result.codes.numpy(), 0), codes)


def test_rows_do_not_influence_each_other() -> None:
    weight, hessian = normal(9, 30), correlated(30)
    maxq = torch.full((9, 4), 7)
    together = gptq(weight, hessian, BOUNDS, maxq)
    for row in range(9):
        alone = gptq(weight[row : row + 1], hessian, BOUNDS, maxq[:1])
        assert torch.equal(alone.codes[0], together.codes[row])
        assert torch.equal(alone.scales[0], together.scales[row])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_feedback_beats_rounding_to_nearest(bits: int) -> None:
    weight, hessian = normal(16, 64), correlated(64)
    bounds = [(0, 32), (32, 64)]
    maxq = torch.full((16, 2), 2**bits - 1)
    with_feedback = gptq(weight, hessian, bounds, maxq)
    nearest = gptq(weight, torch.diag(hessian.diagonal()), bounds, maxq)  # no correlation, so nothing to feed back
    losses = [loss(weight, dequantise(*r[:3], bounds), hessian) for r in (with_feedback, nearest)]
    assert losses[0] < 0.6 * losses[1]  # a third of the directions hold the energy: measured 0.1 to 0.3


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_the_scale_of_the_hessian_does_not_matter(factor: float) -> None:
    """Gradients of a large model are tiny: H of 1e-30 is a normal case. Powers of ten cost one rounding."""
    weight, hessian = normal(4, 30), correlated(30)
    maxq = torch.full((4, 4), 15)
    plain, scaled = gptq(weight, hessian, BOUNDS, maxq), gptq(weight, hessian * factor, BOUNDS, maxq)
    assert scaled.fallback == ""
    assert torch.equal(scaled.codes, plain.codes)


def nearest_codes(weight: Tensor, bits: int) -> Tensor:
    """Rounding to nearest on the grids that equal importance of all columns gives."""
    result = torch.zeros(weight.shape)
    for start, stop in BOUNDS:
        for row in range(weight.shape[0]):
            target = weight[row, start:stop].double().numpy()
            s, z = fit(target, np.ones(stop - start), 2**bits - 1)
            result[row, start:stop] = torch.from_numpy(np.clip(np.round(target / s + z), 0, 2**bits - 1))
    return result


def with_off_diagonal(value: float) -> Tensor:
    """About the identity, with a pair of columns correlated beyond what is possible: an eigenvalue of about 1 - value.

    The diagonal differs a little, so that the order of visiting is given.
    """
    hessian = torch.diag(1 + 1e-3 * torch.randperm(30, generator=torch.Generator().manual_seed(0)))
    hessian[3, 20] = hessian[20, 3] = value
    return hessian


def rank_three() -> Tensor:
    x = normal(3, 30, seed=5)
    return x.T @ x


def with_dead_inputs() -> Tensor:
    hessian = correlated(30)
    hessian[:, 4:9] = hessian[4:9] = 0
    hessian[range(4, 9), range(4, 9)] = torch.arange(5) * 1e-20  # an order for them
    return hessian


@pytest.mark.parametrize(
    ("hessian", "note", "damping"),
    [
        (rank_three(), "", 0.01),
        (with_dead_inputs(), "", 0.01),
        (with_off_diagonal(1.06), "damping 0.1 in torch.float32", 0.1),
        (with_off_diagonal(1.5), "damping 1 in torch.float32", 1.0),
    ],
)
def test_damping_is_raised_until_it_is_enough(hessian: Tensor, note: str, damping: float) -> None:
    weight, maxq = normal(4, 30), torch.full((4, 4), 7)
    result = gptq(weight, hessian, BOUNDS, maxq)
    assert result.fallback == note
    codes, _, _ = textbook(weight.double().numpy(), hessian.double().numpy(), BOUNDS, maxq.numpy(), damping)
    np.testing.assert_array_equal(result.codes.numpy(), codes)


@pytest.mark.parametrize(
    ("hessian", "note"),
    [
        (with_off_diagonal(3.0), "Hessian not positive definite: rounded to nearest"),
        (torch.zeros(30, 30), "no usable Hessian: rounded to nearest"),
        (
            torch.eye(30).index_put_((torch.tensor([4]), torch.tensor([5])), torch.tensor(torch.nan)),
            "no usable Hessian",
        ),
        (
            torch.eye(30).index_put_((torch.tensor([4]), torch.tensor([4])), torch.tensor(torch.inf)),
            "no usable Hessian",
        ),
    ],
)
def test_the_last_resort_is_rounding_to_nearest(hessian: Tensor, note: str) -> None:
    weight = normal(4, 30)
    result = gptq(weight, hessian, BOUNDS, torch.full((4, 4), 7))
    assert result.fallback.startswith(note)
    assert torch.equal(result.codes.float(), nearest_codes(weight, 3))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["zero", "constant", "negative", "tiny", "huge", "one large", "subnormal"])
def test_degenerate_groups_stay_finite(kind: str, bits: int) -> None:
    weight = normal(5, 30)
    group = {
        "zero": torch.zeros(5, 9),
        "constant": torch.full((5, 9), 0.37),
        "negative": torch.full((5, 9), -2.5),
        "tiny": weight[:, 7:16] * 1e-8,
        "huge": weight[:, 7:16] * 1e6,
        "one large": weight[:, 7:16].clone().index_fill_(1, torch.tensor([2]), 3e4),
        "subnormal": torch.full((5, 9), 1e-42),
    }[kind]
    weight[:, 7:16] = group
    result = gptq(weight, correlated(30), BOUNDS, torch.full((5, 4), 2**bits - 1))
    rounded = dequantise(*result[:3], BOUNDS)
    assert bool(rounded.isfinite().all())
    assert bool(result.scales.isfinite().all())
    assert float(result.scales.min()) > 0
    assert int(result.codes.max()) <= 2**bits - 1
    assert int(result.zeros.max()) <= 2**bits - 1
    if kind in ("zero", "subnormal"):
        plain = gptq(weight, torch.diag(correlated(30).diagonal()), BOUNDS, torch.full((5, 4), 2**bits - 1))
        assert float(dequantise(*plain[:3], BOUNDS)[:, 7:16].abs().max()) == 0
    if kind in ("constant", "negative"):
        # Without feedback a constant is an end of its grid: exact but for the float16 scale.
        plain = gptq(weight, torch.diag(correlated(30).diagonal()), BOUNDS, torch.full((5, 4), 2**bits - 1))
        error = dequantise(*plain[:3], BOUNDS)[:, 7:16] - group
        assert float(error.abs().max()) <= 2.0**-11 * float(group.abs().max())
