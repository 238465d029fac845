"""Coordinate descent: against a brute-force loop in float64, never worse, and stored values as they are decoded."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from circuitpress.formats.scales import round_scales
from circuitpress.quantize import gptq
from circuitpress.quantize.grid import AffineGrids, scale_tops
from circuitpress.quantize.polish import Block, polish

from .test_feedback import BOUNDS, correlated, dequantise, loss, normal

DAMPING = 0.01


def damped(hessian: Tensor) -> Tensor:
    return hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))


def slow_sweep(weight: Tensor, hessian: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, maxq: Tensor) -> Tensor:
    """One sweep over the codes [rows, cols] of fixed grids in float64, row by row and column by column."""
    h = damped(hessian).double().numpy()
    column = np.repeat(np.arange(len(BOUNDS)), [stop - start for start, stop in BOUNDS])
    w, c = weight.double().numpy(), codes.double().numpy().copy()
    s, z, top = (x.double().numpy()[:, column] for x in (scales, zeros, maxq))
    for row in range(len(w)):
        for j in range(w.shape[1]):
            error = (c[row] - z[row]) * s[row] - w[row]
            others = h[j] @ error - h[j, j] * error[j]
            wish = w[row, j] - others / h[j, j]
            c[row, j] = np.clip(np.round(wish / s[row, j] + z[row, j]), 0, top[row, j])
    return torch.from_numpy(c)


class Fixed(AffineGrids):
    """Grids that are not refitted."""

    def refit(self, group: int, codes: Tensor, block: Block) -> Tensor:
        del block
        return (codes - self.zeros[group]) * self.scales[group]


def state(weight: Tensor, hessian: Tensor, maxq: Tensor, kind: type[AffineGrids]) -> tuple[Tensor, Tensor, AffineGrids]:
    """Codes and values [cols, rows] and grids as GPTQ leaves them."""
    rounding = gptq(weight, hessian, BOUNDS, maxq)
    grids = kind(maxq)
    grids.scales, grids.zeros = rounding.scales.T.float().contiguous(), rounding.zeros.T.float().contiguous()
    values = dequantise(*rounding[:3], BOUNDS).float().T.contiguous()
    return rounding.codes.T.float().contiguous(), values, grids


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_sweep_is_the_loop_over_weights(bits: int, seed: int) -> None:
    weight, hessian = normal(6, 30, seed=seed), correlated(30, seed=seed + 7)
    maxq = torch.full((6, 4), 2**bits - 1)
    codes, values, grids = state(weight, hessian, maxq, Fixed)
    expected = slow_sweep(weight, hessian, codes.T, grids.scales.T, grids.zeros.T, maxq)
    assert bits == 8 or not torch.equal(expected, codes.T.double())
    polish(weight.T.contiguous(), hessian, BOUNDS, codes, values, grids, sweeps=1)
    assert torch.equal(codes.T.double(), expected)
    torch.testing.assert_close(
        values.T.double(), dequantise(codes.T, grids.scales.T, grids.zeros.T, BOUNDS), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("tops", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_the_error_never_rises(bits: int, tops: bool) -> None:
    for seed in range(8):
        weight, hessian = normal(9, 30, seed=seed), correlated(30, seed=seed + 20)
        maxq = torch.full((9, 4), 2**bits - 1)
        exponents = scale_tops(weight, BOUNDS, bits).expand(-1, 4) if tops else None
        plain = gptq(weight, hessian, BOUNDS, maxq, tops=exponents)
        better = gptq(weight, hessian, BOUNDS, maxq, tops=exponents, polished=True)
        errors = [
            torch.stack([torch.tensor(loss(weight[r : r + 1], dequantise(*x[:3], BOUNDS)[r : r + 1], damped(hessian)))
                         for r in range(9)])
            for x in (plain, better)
        ]  # fmt: skip
        assert bool((errors[1] <= errors[0] * (1 + 1e-6)).all())
        assert float(errors[1].sum()) < float(errors[0].sum())
        assert better.values is not None
        torch.testing.assert_close(better.values.double(), dequantise(*better[:3], BOUNDS), rtol=1e-5, atol=1e-5)
        if exponents is not None:
            assert torch.equal(round_scales(better.scales.float(), exponents).half(), better.scales)


def test_sweeps_end_where_no_single_code_can_be_better() -> None:
    weight, hessian = normal(5, 30), correlated(30)
    maxq = torch.full((5, 4), 7)
    codes, values, grids = state(weight, hessian, maxq, Fixed)
    polish(weight.T.contiguous(), hessian, BOUNDS, codes, values, grids, sweeps=50)
    best = loss(weight, values.T, damped(hessian))
    column = torch.repeat_interleave(torch.arange(4), torch.tensor([7, 9, 1, 13]))
    for row in range(5):
        for c in range(30):
            for move in (-1, 1):
                if 0 <= float(codes[c, row]) + move <= 7:
                    other = values.T.clone()
                    other[row, c] += move * grids.scales[column[c], row]
                    assert loss(weight, other, damped(hessian)) >= best * (1 - 1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_refitted_grids_are_the_least_squares_of_their_neighbourhood(masked: bool) -> None:
    """Scale and zero of a group against a search over all zeros next to the present one and many scales, in float64."""
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(16, (13, 6), generator=generator).float()
    hessian = damped(correlated(13))
    free = torch.rand(13, 6, generator=generator) < 0.2 if masked else None
    grids = AffineGrids(torch.full((6, 1), 15))
    grids.scales[:], grids.zeros[:] = 0.3, 7.0
    pull = hessian @ (torch.randn(13, 6, generator=generator) * 1.5)
    on_grid = torch.ones(13, 6) if free is None else (~free).float()

    def error(scale: float, zero: float, row: int) -> float:
        x = (scale * (codes[:, row] - zero) * on_grid[:, row]).double()
        return float(x @ hessian.double() @ x - 2 * x @ pull[:, row].double())

    values = grids.refit(0, codes, Block(hessian, pull, free))
    for row in range(6):
        found = error(float(grids.scales[0, row]), float(grids.zeros[0, row]), row)
        tried = [error(s, z, row) for z in (6.0, 7.0, 8.0) for s in torch.linspace(0.001, 1.5, 3000).tolist()]
        assert found <= min(tried) + 1e-3 * abs(min(tried))
        assert found <= error(0.3, 7.0, row)
        torch.testing.assert_close(values[:, row], grids.scales[0, row] * (codes[:, row] - grids.zeros[0, row]))
    assert torch.equal(grids.scales.half().float(), grids.scales)


def test_kept_groups_and_free_weights() -> None:
    weight, hessian = normal(7, 30), correlated(30)
    maxq = torch.full((7, 4), 7)
    maxq[:, 1] = 0
    maxq[2, 3] = 0
    free = torch.rand(7, 30, generator=torch.Generator().manual_seed(3)) < 0.1
    found = gptq(weight, hessian, BOUNDS, maxq, free=free, polished=True)
    plain = gptq(weight, hessian, BOUNDS, maxq, free=free)
    assert found.values is not None and plain.values is not None
    kept = (maxq == 0)[:, torch.repeat_interleave(torch.arange(4), torch.tensor([7, 9, 1, 13]))]
    assert torch.equal(found.values[kept & ~free], weight[kept & ~free])
    assert torch.equal(found.values[free & ~kept].half().float(), found.values[free & ~kept])
    rest = ~kept & ~free
    torch.testing.assert_close(found.values[rest].double(), dequantise(*found[:3], BOUNDS)[rest], rtol=1e-5, atol=1e-5)
    assert loss(weight, found.values, damped(hessian)) < loss(weight, plain.values, damped(hessian))


def test_nothing_is_polished_without_a_usable_hessian() -> None:
    weight, maxq = normal(4, 30), torch.full((4, 4), 7)
    broken = torch.full((30, 30), torch.nan)
    plain, polished = (gptq(weight, broken, BOUNDS, maxq, polished=p) for p in (False, True))
    assert polished.fallback == "no usable Hessian: rounded to nearest"
    assert torch.equal(plain.codes, polished.codes) and torch.equal(plain.scales, polished.scales)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_the_scale_of_the_hessian_does_not_matter(factor: float) -> None:
    weight, hessian, maxq = normal(4, 30), correlated(30), torch.full((4, 4), 7)
    plain, scaled = (gptq(weight, h, BOUNDS, maxq, polished=True) for h in (hessian, hessian * factor))
    same = (plain.codes == scaled.codes).float().mean()
    assert float(same) > 0.97  # powers of ten cost one rounding of every element


def bounds_of(cols: int, size: int) -> Sequence[tuple[int, int]]:
    return [(at, min(at + size, cols)) for at in range(0, cols, size)]


def test_dead_inputs_and_single_rows() -> None:
    hessian = correlated(20)
    hessian[:, 5:8] = hessian[5:8] = 0
    weight = normal(1, 20)
    found = gptq(weight, hessian, bounds_of(20, 7), torch.full((1, 3), 3), polished=True)
    assert found.values is not None
    assert bool(found.values.isfinite().all()) and bool((found.scales > 0).all())
