"""Measured swaps: a case where prices do not add up, limits that hold, and noise that must not be taken for gain."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from circuitpress.plan import Budget, improve, solve
from circuitpress.plan.constraints import budget, floor
from circuitpress.plan.swaps import _Move, _rates
from circuitpress.units import Prices

from .instances import make_prices

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Model:
    """A made-up model: KL is the sum of prices times a factor of each group, with pairs of groups that help or hurt.

    Windows differ by a common difficulty, as real ones do, and by `noise` that each plan has for itself.
    """

    def __init__(self, prices: Prices, seed: int, *, noise: float = 0.0, bent: bool = True) -> None:
        self.prices, self.noise = prices, noise
        self.draw = np.random.default_rng(seed)
        groups = len(prices.groups)
        self.factor = self.draw.lognormal(0, 0.7, groups) if bent else np.ones(groups)
        self.windows = self.draw.lognormal(0, 0.5, 16)
        self.measured: list[Ints] = []

    def kl(self, choice: Ints) -> float:
        rows = np.arange(len(choice))
        root = np.sqrt(self.prices.nats[rows, choice] * self.factor)
        neighbours = float((root[:-1] * root[1:]).sum())
        return float((root**2).sum()) + 0.3 * neighbours

    def __call__(self, choices: Sequence[Ints]) -> list[Floats]:
        self.measured += [choice.copy() for choice in choices]
        base = self.kl(choices[0])
        return [
            self.windows * self.kl(choice) + self.noise * base * self.draw.standard_normal(16) for choice in choices
        ]


def problem(seed: int, groups: int = 21) -> tuple[Prices, list, Ints]:
    prices = make_prices(seed, groups)
    rules = [budget(prices, Budget.parse("3.2bpw"), other_bytes=0)]
    return prices, rules, solve(prices, rules).choice


@pytest.mark.parametrize("seed", range(4))
def test_plans_get_better_where_prices_do_not_add_up(seed: int) -> None:
    prices, rules, start = problem(seed)
    model = Model(prices, seed, noise=1e-3)
    found = improve(prices, rules, start, model, model, most=150)
    rows = np.arange(len(start))
    assert found.measured == len(model.measured) <= 150
    assert rules[0].weights is not None
    assert rules[0].weights[rows, found.choice].sum() <= rules[0].cap
    assert model.kl(found.choice) < 0.995 * model.kl(start)
    assert found.kl is not None
    assert found.start_kl is not None
    # What it says of the gain is what it is: a mean over windows, with noise of 1e-3 in each.
    scale = model.windows.mean()
    assert found.start_kl == pytest.approx(scale * model.kl(start), rel=5e-3)
    assert found.kl == pytest.approx(scale * model.kl(found.choice), rel=1e-2)


def test_gains_approach_those_of_the_true_prices() -> None:
    """With factors but no neighbours the best plan is the solver's under the true prices: most of the way is made."""
    for seed in range(4):
        prices, rules, start = problem(seed, groups=30)
        model = Model(prices, seed)
        model.kl = lambda choice, m=model, p=prices: float(  # pyright: ignore
            (p.nats * m.factor[:, None])[np.arange(len(choice)), choice].sum()
        )
        true = Prices(
            prices.groups, prices.formats, prices.nbytes, prices.nats * model.factor[:, None], prices.nats, prices.nats
        )
        best = model.kl(solve(true, rules).choice)
        found = improve(prices, rules, start, model, model, most=300)
        assert model.kl(start) - model.kl(found.choice) > 0.6 * (model.kl(start) - best)


def test_every_rule_holds_in_every_swap() -> None:
    prices, rules, _ = problem(3)
    rules.append(floor(prices, [0, 1], 3))
    start = solve(prices, rules).choice
    model = Model(prices, 3)
    found = improve(prices, rules, start, model, model, most=120)
    layers = np.array([group.layer for group in prices.groups])
    bits = np.array([2, 3, 4, 8, 16])
    assert (bits[found.choice[layers < 2]] >= 3).all()


def test_noise_is_not_taken_for_gain() -> None:
    """Prices that are exact, and plans that measure all alike but for noise: chance may win rarely, never by much."""
    kept = 0
    for seed in range(6):
        prices, rules, start = problem(seed)
        model = Model(prices, seed, noise=0.3, bent=False)
        found = improve(prices, rules, start, model, model, most=60)
        kept += np.array_equal(found.choice, start)
        assert model.kl(found.choice) < 1.1 * model.kl(start)
    assert kept >= 1


@pytest.mark.parametrize("most", [0, 1, 4, 5, 7, 20])
def test_no_more_is_measured_than_was_allowed(most: int) -> None:
    prices, rules, start = problem(1)
    model = Model(prices, 1)
    found = improve(prices, rules, start, model, model, most=most)
    assert found.measured == len(model.measured) <= most
    if most < 5:
        assert found.kl is None
        assert np.array_equal(found.choice, start)


def test_one_format_leaves_nothing_to_swap() -> None:
    prices = make_prices(0, 5, formats=("int4g64",))
    rules = [budget(prices, Budget.parse("5bpw"), other_bytes=0)]
    model = Model(prices, 0)
    found = improve(prices, rules, np.zeros(5, dtype=np.int64), model, model, most=50)
    assert found.measured == 0
    assert found.rounds == ()


def test_one_window_says_nothing_of_a_single_change() -> None:
    """Its error is unknown: the common rate is taken, and nothing is NaN."""
    before = np.full((2, 2), np.nan)
    moves = [_Move(0, 1, -0.1, 10.0), _Move(1, 0, 0.2, -10.0)]
    rates = _rates(before, moves, [np.array([-0.3]), np.array([0.2])])
    assert np.isfinite(rates).all()
    np.testing.assert_allclose(rates, 2.0)  # the median of 3 and 1
