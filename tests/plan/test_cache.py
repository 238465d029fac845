"""Bits of a cache within a budget: the optimum, and budgets that are refused."""

from itertools import product

import numpy as np
import pytest

from circuitpress.errors import InfeasibleBudget, RecipeError
from circuitpress.plan.cache import plan_cache
from circuitpress.units import Group, Prices, Segment


def table(heads: int) -> Prices:
    """Random prices of 2, 4, 8 and 16 bits."""
    draw = np.random.default_rng(heads)
    nats = draw.lognormal(0, 2, (heads, 1)) * np.array([1.0, 0.06, 2e-4, 0.0])
    nbytes = np.tile(np.array([160, 288, 544, 1024]), (heads, 1))
    groups = tuple(Group(f"L0.keys.{n}", 0, (Segment("m", "rows", n, n + 1, 8, 1),)) for n in range(heads))
    return Prices(groups, ("cache2", "cache4", "cache8", "cache16"), nbytes, nats, nats, nats)


@pytest.mark.parametrize("budget", ["30%", "27B", "100%"])
def test_a_plan_is_the_cheapest_within_its_bytes(budget: str) -> None:
    prices = table(6)
    cap = {"30%": 0.3 * 6 * 1024, "27B": 27 * 64, "100%": 6 * 1024}[budget]
    solution = plan_cache(prices, budget, tokens=64)
    rows = np.arange(6)
    best = min(
        float(prices.nats[rows, list(choice)].sum())
        for choice in product(range(4), repeat=6)
        if prices.nbytes[rows, list(choice)].sum() <= cap
    )
    assert solution.nbytes <= cap
    assert solution.nats == pytest.approx(best, rel=1e-3, abs=1e-12)


def test_budgets_are_bytes_of_a_token_or_a_share() -> None:
    with pytest.raises(RecipeError, match="no budget for a cache"):
        plan_cache(table(2), "3.0bpw", tokens=64)
    with pytest.raises(RecipeError, match="not a budget"):
        plan_cache(table(2), "much", tokens=64)
    with pytest.raises(InfeasibleBudget, match="may take 3 bytes of cache and takes 5") as caught:
        plan_cache(table(2), "10%", tokens=64)
    assert caught.value.smallest_bytes == 5
    assert plan_cache(table(2), str(caught.value.hint).removeprefix("--budget "), tokens=64).nbytes == 320
