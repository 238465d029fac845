"""Affine grids: half a step inside the range, the best of the candidates, scales as they are stored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from circuitpress.quantize.grid import fit_grid, round_to_grid


def fitted(target: Tensor, bits: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Scales float32 [rows, 1], zeros [rows, 1] and the rounded weights of `target` [rows, width]."""
    maxq = torch.full((target.shape[0],), float(2**bits - 1))
    scale, zero = fit_grid(target.T, maxq, torch.ones(target.shape[1]) if importance is None else importance)
    assert scale.dtype == torch.float16
    assert bool(scale.isfinite().all()) and bool((scale > 0).all())
    assert bool((zero == zero.round()).all()) and bool((zero >= 0).all()) and bool((zero <= maxq).all())
    codes, value = round_to_grid(target.T, scale.float(), zero, maxq)
    assert bool((codes == codes.round()).all()) and float(codes.min()) >= 0 and bool((codes <= maxq).all())
    return scale.float()[:, None], zero[:, None], value.T


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 5), width=st.integers(1, 40), bits=st.integers(2, 8), seed=st.integers(0, 10**6),
    shift=st.floats(-3, 3), size=st.floats(1e-2, 1e3),
)  # fmt: skip
def test_half_a_step_inside_the_range(rows: int, width: int, bits: int, seed: int, shift: float, size: float) -> None:
    target = size * (torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) + shift)
    s, z, value = fitted(target, bits)
    low, high = -z * s, (2**bits - 1 - z) * s
    inside = (target >= low) & (target <= high)
    # Beside the half step one float32 rounding of the quotient, which is at most 255.
    assert bool(((target - value).abs() <= s * (0.5 + 256 * 2.0**-23))[inside].all())
    ends = torch.where(target < 0, low, high)
    torch.testing.assert_close(value[~inside], ends[~inside])


@pytest.mark.parametrize("sign", [1, -1])
def test_zero_is_always_on_the_grid(sign: int) -> None:
    """A group on one side of zero must still be able to say zero: pruned weights stay pruned."""
    target = sign * (torch.rand(6, 20, generator=torch.Generator().manual_seed(0)) + 3)
    target[:, 4] = 0
    _, _, value = fitted(target, 4)
    assert float(value[:, 4].abs().max()) == 0


def test_the_range_is_clipped_where_that_pays() -> None:
    """One outlier among 200 normal weights in 2 bits: clipping is better, unless the outlier is all that counts."""
    target = torch.randn(1, 200, generator=torch.Generator().manual_seed(0))
    target[0, 7] = 9.0
    scale, _, _ = fitted(target, 2)
    assert float(scale) < 0.7 * float((target.max() - target.min()) / 3)
    importance = torch.full((200,), 1e-6)
    importance[7] = 1.0
    _, _, value = fitted(target.abs(), 2, importance)
    assert float((value - target)[0, 7].abs()) < 2.0**-11 * 9  # the end of the grid, but for the float16 scale


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_other_candidate_is_better(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    target, importance = torch.randn(4, 33, generator=generator), torch.rand(33, generator=generator)
    _, _, value = fitted(target, bits, importance)
    maxq = 2**bits - 1
    for row, chosen in zip(target.double(), value.double(), strict=True):
        errors = []
        for factor in torch.linspace(1.0, 0.4, 25, dtype=torch.float64):
            s = ((row.max() - row.min()) * factor / maxq).half().double()
            z = (-row.min() * factor / s).round().clamp(0, maxq)
            errors.append(float((((row / s + z).round().clamp(0, maxq) - z) * s - row).square() @ importance.double()))
        # The sum of 33 squares in float32.
        assert float((chosen - row).square() @ importance.double()) == pytest.approx(min(errors), rel=1e-5)
        assert bits == 4 or min(errors) < errors[0]  # four bits seldom clip
