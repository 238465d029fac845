"""One format for every group at the least total price within hard caps: a multiple-choice knapsack.

    min sum_i price[i, c_i]   subject to   sum_i weight_k[i, c_i] <= cap_k for every cap k,   c_i allowed

1. Masks are joined; a cap that even the lightest options exceed is refused with the smallest feasible budget.
2. The byte budget is solved by its Lagrangian, exactly but for its last step (`hull.py`): a plan and a bound.
3. The slack that the last step could not use is filled greedily with the upgrades that save most.
4. If the gap to the bound is above 0.1 %, or another cap is exceeded, HiGHS branches and bounds over the options that
   can still matter: with reduced costs, those whose bound already exceeds the plan in hand are left out. At a few
   thousand groups the gap of step 3 is below 0.01 %, so this is work for small models and for several caps.
5. What HiGHS returns is checked in exact arithmetic; the better plan wins.

Prices below zero can only be noise (a measured price may be), so they count as zero: their sum must not promise that
compression improves a model. A price of infinity is an option that is not on offer. Prices need not fall with bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import CircuitpressError
from ..units import Prices
from .constraints import Constraint
from .feasible import caps_clash, join_masks, refuse_infeasible
from .hull import build_hull, take
from .silence import silent_stdout

GAP = 1e-3

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Solution:
    """`choice[n]` is each group's column of the price table; no feasible plan is priced below `bound`."""

    choice: Ints
    nats: float
    nbytes: int
    bound: float

    @property
    def gap(self) -> float:
        """(nats - bound) / nats; 0 for a plan that is certainly the best."""
        return _gap(self.nats, self.bound)


def solve(prices: Prices, constraints: Sequence[Constraint], *, seconds: float = 20.0) -> Solution:
    """The cheapest plan that every constraint admits; `seconds` limit the exact search of step 4.

    Raises InfeasibleBudget (smallest feasible bits and bytes, the rule to blame) if a cap cannot be met and RecipeError
    if masks leave a group without any format.
    """
    cost = prices.nats.clip(min=0)
    allowed = join_masks(prices, constraints)
    caps = [rule for rule in constraints if rule.weights is not None]
    refuse_infeasible(prices, constraints, allowed)
    nbytes = prices.nbytes.astype(np.float64)
    choice, bound, rate = _relax(cost, allowed, caps, nbytes)
    upper = np.inf
    if _fits(choice, caps):
        choice = _fill(choice, cost, allowed, caps)
        upper = _sum(cost, choice)
    if not np.isfinite(upper) or _gap(upper, bound) > GAP:
        kept = allowed & _can_matter(cost, allowed, caps[0], rate, upper)
        found = _branch(cost, kept, caps, seconds)
        if found.is_infeasible and not np.isfinite(upper):
            smallest = _branch(nbytes, allowed, [rule for rule in caps if rule.name != "budget"], seconds).choice
            raise caps_clash(prices, caps, allowed, None if smallest is None else int(_sum(nbytes, smallest)))
        bound = max(bound, min(found.bound, upper))
        if found.choice is not None and _sum(cost, found.choice) < upper:
            choice, upper = found.choice, _sum(cost, found.choice)
    if not np.isfinite(upper):
        names = ", ".join(rule.name for rule in caps)
        raise CircuitpressError(f"no plan within {names} was found in {seconds:g} s", hint="raise one of these limits")
    choice = _trim(choice, cost, allowed, prices, caps)
    nats = _sum(cost, choice)
    return Solution(choice, nats, int(_pick(prices.nbytes, choice).sum()), min(bound, nats))


def _relax(cost: Floats, allowed: Bools, caps: Sequence[Constraint], nbytes: Floats) -> tuple[Ints, float, float]:
    """The best plan on the hull within the first cap, the relaxation's optimum, the price of one unit of that cap."""
    if not caps:
        cheapest = np.where(allowed, cost, np.inf)
        light = np.where(cheapest == cheapest.min(1, keepdims=True), nbytes, np.inf)
        return np.argmin(light, axis=1), float(cheapest.min(1).sum()), 0.0
    weights, limit = _cap(caps[0])
    hull = build_hull(cost, weights, allowed)
    used = _sum(weights, hull.start) + np.concatenate([[0.0], np.cumsum(hull.weight)])
    count = int(np.searchsorted(used, limit, side="right")) - 1
    if count < 0:  # the lightest plan fits, but only before rounding of the sum
        count = 0
    choice = take(hull, count)
    if count == len(hull.group):
        return choice, _sum(cost, choice), 0.0
    rate = float(hull.ratio[count])
    return choice, _sum(cost, choice) - rate * max(limit - float(used[count]), 0.0), rate


def _fill(choice: Ints, cost: Floats, allowed: Bools, caps: Sequence[Constraint]) -> Ints:
    """Spends what is left of the caps on the upgrades that save most, one at a time."""
    rows, choice = np.arange(len(cost)), choice.copy()
    while True:
        saved = np.where(allowed, cost[rows, choice][:, None] - np.where(allowed, cost, 0), 0)
        for weights, limit in map(_cap, caps):
            more = weights - weights[rows, choice][:, None]
            saved[more > limit - _sum(weights, choice)] = 0
        best = int(np.argmax(saved))
        if saved.flat[best] <= 0:
            return choice
        group, option = divmod(best, cost.shape[1])
        choice[group] = option


def _can_matter(cost: Floats, allowed: Bools, rule: Constraint, rate: float, upper: float) -> Bools:
    """Options that a plan cheaper than `upper` may hold: their reduced cost does not exceed the Lagrangian's gap."""
    weights, limit = _cap(rule)
    priced = np.where(allowed, cost + rate * weights, np.inf)
    least = priced.min(1, keepdims=True)
    total = float(least.sum())
    return priced - least <= upper - (total - rate * limit) + 1e-9 * abs(total)


@dataclass(frozen=True, eq=False)
class _Found:
    """What HiGHS returned: a plan within the caps or None, a lower bound (-inf if unknown), whether none exists."""

    choice: Ints | None
    bound: float
    is_infeasible: bool


def _branch(cost: Floats, allowed: Bools, caps: Sequence[Constraint], seconds: float) -> _Found:
    """The best plan of `allowed` options by branch and bound.

    Integer variables are whole only to 1e-6, so a plan can come back some bytes too large; one more try with the caps
    lowered by as much settles that.
    """
    first = _milp(cost, allowed, caps, 0.0, seconds)
    if first.choice is None or _fits(first.choice, caps):
        return first
    second = _milp(cost, allowed, caps, 1e-6, seconds)
    choice = second.choice if second.choice is not None and _fits(second.choice, caps) else None
    return _Found(choice, first.bound, False)


def _milp(cost: Floats, allowed: Bools, caps: Sequence[Constraint], tighten: float, seconds: float) -> _Found:
    from scipy import optimize, sparse

    group, option = np.nonzero(allowed)
    pick = sparse.csr_array((np.ones(len(group)), (group, np.arange(len(group)))), shape=(len(cost), len(group)))
    rules = [optimize.LinearConstraint(pick, 1, 1)]
    for weights, limit in map(_cap, caps):
        base = np.where(allowed, weights, np.inf).min(1)
        row = (weights - base[:, None])[group, option]
        room = limit - base.sum() - tighten * abs(limit)
        unit = max(room, row.max() * 1e-3, 1e-300)
        rules.append(optimize.LinearConstraint(sparse.csr_array(row[None] / unit), -np.inf, room / unit))
    # The tolerances of HiGHS are absolute: caps are scaled to 1, and prices, which may be 1e-6 nats, to thousands.
    scale = 1e3 * len(cost) / (float(cost[allowed].sum()) or 1.0)
    with silent_stdout():
        result = optimize.milp(
            scale * cost[group, option],
            integrality=np.ones(len(group)),
            bounds=optimize.Bounds(0, 1),
            constraints=rules,
            options={"time_limit": seconds, "mip_rel_gap": GAP / 10},
        )
    dual = result.mip_dual_bound
    bound = -np.inf if dual is None or not np.isfinite(dual) else float(dual) / scale
    if result.x is None:
        return _Found(None, bound, result.status == 2)
    table = np.full(cost.shape, -1.0)
    table[group, option] = result.x
    return _Found(np.argmax(table, axis=1), bound, False)


def _trim(choice: Ints, cost: Floats, allowed: Bools, prices: Prices, caps: Sequence[Constraint]) -> Ints:
    """Gives back bytes that buy nothing: each group's lightest option at the same price, where all caps still hold."""
    same = allowed & (np.where(allowed, cost, np.inf) <= _pick(cost, choice)[:, None])
    lighter = np.argmin(np.where(same, prices.nbytes, np.iinfo(np.int64).max), axis=1)
    return lighter if _fits(lighter, caps) else choice


def _cap(rule: Constraint) -> tuple[Floats, float]:
    assert rule.weights is not None and rule.cap is not None
    return rule.weights, rule.cap


def _fits(choice: Ints, caps: Sequence[Constraint]) -> bool:
    return all(_sum(weights, choice) <= limit for weights, limit in map(_cap, caps))


def _pick(table: NDArray[np.float64] | NDArray[np.int64], choice: Ints) -> NDArray[np.float64] | NDArray[np.int64]:
    return table[np.arange(len(choice)), choice]


def _sum(table: Floats, choice: Ints) -> float:
    return float(_pick(table, choice).sum())


def _gap(nats: float, bound: float) -> float:
    return max(0.0, nats - bound) / nats if nats > 0 else 0.0
