"""The solver against brute force, its bound, and budgets that no plan may exceed."""

import ctypes
import os
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitpress.errors import InfeasibleBudget, RecipeError
from circuitpress.plan import Budget, Constraint, solve
from circuitpress.plan import constraints as rules
from circuitpress.units import Prices

from .instances import FORMATS, brute_force, make_prices, replaced


def byte_cap(prices: Prices, share: float) -> Constraint:
    """A budget at `share` of the way from the smallest plan to the largest."""
    low, high = prices.nbytes.min(1).sum(), prices.nbytes.max(1).sum()
    return Constraint("budget", "test", weights=prices.nbytes.astype(float), cap=float(int(low + share * (high - low))))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_as_good_as_trying_everything(seed: int, share: float) -> None:
    prices = make_prices(seed, 6)
    limit = byte_cap(prices, share)
    best = brute_force(prices, [limit])
    solution = solve(prices, [limit])
    assert solution.nbytes <= limit.cap
    assert best - 1e-12 <= solution.nats <= best * 1.001 + 1e-12
    assert solution.bound <= best + 1e-12
    assert solution.nats == pytest.approx(prices.nats[np.arange(6), solution.choice].sum())


@pytest.mark.parametrize("seed", range(6))
def test_as_good_as_trying_everything_under_several_rules(seed: int) -> None:
    prices = make_prices(seed, 6)
    draw = np.random.default_rng(seed)
    latency = draw.uniform(1, 5, prices.nats.shape)
    held = [
        byte_cap(prices, 0.3),
        rules.cap(prices, "latency", latency, float(np.sort(latency, 1)[:, :2].mean(1).sum()), reason="measured"),
        rules.floor(prices, [1], 3),
    ]
    best = brute_force(prices, held)
    if not np.isfinite(best):
        with pytest.raises(InfeasibleBudget):
            solve(prices, held)
        return
    solution = solve(prices, held)
    assert best - 1e-12 <= solution.nats <= best * 1.001
    assert solution.bound <= best + 1e-12
    for rule in held[:2]:
        assert rule.weights is not None and rule.cap is not None
        assert rule.weights[np.arange(6), solution.choice].sum() <= rule.cap


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), groups=st.integers(1, 12), share=st.floats(0, 1), holes=st.booleans())
def test_never_above_the_budget_nor_below_the_bound(seed: int, groups: int, share: float, holes: bool) -> None:
    prices = make_prices(seed, groups)
    if holes:
        nats = prices.nats.copy()
        nats[np.random.default_rng(seed).random(nats.shape) < 0.3] = np.inf
        nats[:, -1] = 0
        prices = replaced(prices, nats)
    limit = byte_cap(prices, share)
    try:
        solution = solve(prices, [limit])
    except InfeasibleBudget as error:
        assert holes
        assert error.smallest_bytes > limit.cap  # pyright: ignore[reportOperatorIssue]
        return
    assert solution.nbytes <= limit.cap  # pyright: ignore[reportOperatorIssue]
    assert solution.bound <= solution.nats
    assert np.isfinite(prices.nats[np.arange(groups), solution.choice]).all()


def test_four_thousand_groups_take_a_moment() -> None:
    prices = make_prices(0, 4000)
    limit = rules.budget(prices, Budget.parse("3.0bpw"), other_bytes=0)
    start = time.perf_counter()
    solution = solve(prices, [limit])
    assert time.perf_counter() - start < 5
    assert solution.gap < 1e-3
    assert 0.9999 * limit.cap < solution.nbytes <= limit.cap  # pyright: ignore[reportOptionalOperand, reportOperatorIssue]


def test_equal_prices_take_the_fewest_bytes() -> None:
    prices = make_prices(3, 4)
    free = replaced(prices, np.zeros_like(prices.nats))
    for held in ([], [byte_cap(free, 0.6)]):
        solution = solve(free, held)
        assert solution.nats == solution.bound == solution.gap == 0
        assert solution.choice.tolist() == [0] * 4


def test_noise_below_zero_counts_as_zero() -> None:
    prices = make_prices(3, 3)
    nats = prices.nats.copy()
    nats[1] = [0.5, -0.2, -0.1, -0.4, 0.0]
    solution = solve(replaced(prices, nats), [])
    assert solution.choice[1] == 1
    assert solution.nats == 0


def test_prices_that_rise_with_bytes_are_passed_over() -> None:
    prices = make_prices(1, 1)
    rising = replaced(prices, np.array([[0.3, 0.5, 0.2, 0.4, 0.2]]))
    assert solve(rising, []).choice.tolist() == [2]
    assert solve(rising, [byte_cap(rising, 0.1)]).choice.tolist() == [0]


def test_bytes_of_a_large_model_are_counted_exactly() -> None:
    prices = make_prices(4, 9)
    large = type(prices)(prices.groups, FORMATS, prices.nbytes * 10**8 + 7, prices.nats, prices.nats, prices.nats)
    for share in (0.1, 0.13, 0.4):
        limit = byte_cap(large, share)
        assert solve(large, [limit]).nbytes <= limit.cap  # pyright: ignore[reportOperatorIssue]


def test_infeasible_says_the_smallest_that_works() -> None:
    prices = make_prices(5, 5)
    with pytest.raises(InfeasibleBudget, match=r"2\.0bpw is [\d,]+ bytes .*; the smallest plan takes") as caught:
        solve(prices, [rules.budget(prices, Budget.parse("2.0bpw"), other_bytes=0)])
    error = caught.value
    assert error.exit_code == 3
    assert error.smallest_bytes == prices.nbytes[:, 0].sum()
    assert error.smallest_bits == pytest.approx(8 * error.smallest_bytes / prices.numel.sum())
    assert error.hint is not None
    typed = error.hint.split("--budget ")[1].split()[0].rstrip(",")
    solution = solve(prices, [rules.budget(prices, Budget.parse(typed), other_bytes=0)])
    assert solution.nbytes >= error.smallest_bytes


def test_infeasible_blames_the_rule_in_the_way() -> None:
    prices = make_prices(5, 6)
    limit = rules.budget(prices, Budget.parse("2.6bpw"), other_bytes=0)
    kept = rules.protect(prices, ["L1"])
    with pytest.raises(InfeasibleBudget, match=r"in the way: protect \(L1 keep the best format on offer\)$"):
        solve(prices, [limit, kept, rules.floor(prices, [0], 2)])
    solve(prices, [limit, rules.floor(prices, [0], 2)])


def test_infeasible_in_bytes_names_the_other_weights() -> None:
    prices = make_prices(5, 5)
    with pytest.raises(InfeasibleBudget, match=r"5kB for all weight files leaves -1,000 bytes .* beside 6,000"):
        solve(prices, [rules.budget(prices, Budget.parse("5kB"), other_bytes=6000)])


def test_infeasible_latency_is_named() -> None:
    prices = make_prices(5, 5)
    slow = rules.cap(prices, "latency", np.ones(prices.nats.shape), 4.0, reason="4 ms a token")
    with pytest.raises(InfeasibleBudget, match=r"latency \(4 ms a token\) cannot be met: it allows 4, .* less than 5"):
        solve(prices, [slow])


def test_caps_that_clash_are_named() -> None:
    prices = make_prices(5, 5)
    narrow_is_slow = np.broadcast_to(np.array([9.0, 1, 1, 1, 1]), prices.nats.shape)
    held = [byte_cap(prices, 0.0), rules.cap(prices, "latency", narrow_is_slow, 5.0, reason="kernel")]
    with pytest.raises(InfeasibleBudget, match="budget .* and latency .* cannot be met together") as caught:
        solve(prices, held)
    assert caught.value.smallest_bytes == prices.nbytes[:, 1].sum()


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    # Without care, C code in HiGHS prints to standard output for some of these.
    for seed in range(30):
        prices = make_prices(seed, 42)
        solve(prices, [byte_cap(prices, 0.15)])
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr() == ("", "")
    os.write(1, b"back")
    assert capfd.readouterr().out == "back"


def test_masks_that_leave_nothing_are_an_error() -> None:
    prices = make_prices(5, 3)
    nothing = Constraint("kernel", "no kernel runs it", allowed=np.zeros(prices.nats.shape, dtype=bool))
    with pytest.raises(RecipeError, match=r"model\.layers\.0\.self_attn\.q_proj: kernel \(no kernel runs it\)"):
        solve(prices, [nothing])
    with pytest.raises(RecipeError, match="nothing was priced"):
        solve(replaced(prices, np.full(prices.nats.shape, np.inf)), [])
