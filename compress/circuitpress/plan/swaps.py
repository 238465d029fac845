"""Measured swaps: a plan is improved by measuring whole plans around it, where prices no longer add up.

The sum of prices misses how errors of different groups act together; at 2 to 3 bits whole plans cost up to twice the
sum, and not every group the same multiple. So the plan's surroundings are measured, as exllamav3 does for one tensor
at a time (https://github.com/turboderp-org/exllamav3, doc/exl3.md), but in KL and with the solver in the loop:

1. Single moves: for the groups where another format is nearly as good (least reduced cost, price + rate x bytes), one
   step up and one step down its hull, everything else as in the plan. The measured change over the change of price is
   that group's own rate of exchange; what noise could explain is shrunk towards the common rate.
2. Prices are scaled by these rates and the budget is spent anew with at most 2, 4, 8, ... groups changed. Each answer
   is a swap: some groups up, others down, the bytes within every cap.
3. The swaps are measured as whole plans on other windows. The best is taken if it is better than the plan by more than
   the standard error of the difference; then all again around the new plan, until nothing improves or `most` plans are
   spent.

Every difference is between plans on the same windows, so only the spread of differences counts. Steps 1 and 3 have
windows of their own: on shared ones a swap that fits their noise confirms itself (babyllama-105 at 4 bits: 8.9 % less
KL there, 0.9 % more on a test text).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..errors import CircuitpressError
from ..units import Prices
from .constraints import Constraint
from .feasible import join_masks
from .hull import build_hull
from .solve import solve

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

Measure = Callable[[Sequence[Ints]], Sequence[Floats]]
"""Measures choices (a column of the price table for each group): the KL of each on every window, in one order."""

PRIOR = 0.5
"""How far groups' rates of exchange spread around the common one, relative to it."""


@dataclass(frozen=True)
class Swaps:
    """What the swaps came to. `start_kl` and `kl` are means over the confirming windows, None if none was measured.

    `measured` is the number of plans measured, `rounds` how many groups the accepted swap of each round changed (0 if
    none was accepted).
    """

    choice: Ints
    start_kl: float | None
    kl: float | None
    measured: int
    rounds: tuple[int, ...]


@dataclass(frozen=True)
class _Move:
    """Group `group` to column `option`; `nats` and `nbytes` are the changes that the table foresees."""

    group: int
    option: int
    nats: float
    nbytes: float


def improve(
    prices: Prices, constraints: Sequence[Constraint], start: Ints, explore: Measure, confirm: Measure, *, most: int,
    seconds: float = 5.0,
) -> Swaps:  # fmt: skip
    """Better plans than `start` (one column for each group) within `constraints`, at the cost of `most` measurements.

    `explore` measures single moves, `confirm` swaps on windows that must be disjoint from the former's. `seconds` limit
    each search of the solver. The result is `start` itself where nothing better was found.
    """
    allowed = join_masks(prices, constraints)
    table = np.where(np.isfinite(prices.nats), prices.nats.clip(min=0), np.inf)
    choice, spent, rounds = start.copy(), 0, []
    rates = np.full((len(table), 2), np.nan)
    first: float | None = None
    current: float | None = None
    while most - spent >= 5:
        moves = _propose(table, prices, allowed, choice, most - spent - _reserve(most - spent))
        if not moves:
            break
        base, *others = explore([choice, *(_moved(choice, move) for move in moves)])
        spent += 1 + len(moves)
        rates = _rates(rates, moves, [other - base for other in others])
        swaps = _swaps(table, prices, constraints, allowed, choice, rates, seconds)[: most - spent - 1]
        if not swaps:
            break
        base, *others = confirm([choice, *swaps])
        spent += 1 + len(swaps)
        current = float(base.mean())
        first = current if first is None else first
        found = [kl - base for kl in others]
        means = np.array([difference.mean() for difference in found])
        best = int(np.argmin(means))
        if means[best] >= -_stderr(found[best]):
            rounds.append(0)
            break
        rounds.append(int((swaps[best] != choice).sum()))
        choice, current = swaps[best], current + float(means[best])
    return Swaps(choice, first, current, spent, tuple(rounds))


def _reserve(left: int) -> int:
    """Measurements kept for the swaps of a round, and twice for the plan itself."""
    return max(3, min(8, left // 4)) + 1


def _propose(table: Floats, prices: Prices, allowed: NDArray[np.bool_], choice: Ints, most: int) -> list[_Move]:
    """At most `most` single moves, one step up or down a group's hull, those of least reduced cost first."""
    nbytes = prices.nbytes.astype(np.float64)
    moves = []
    for i, options in enumerate(_hulls(table, nbytes, allowed)):
        here = nbytes[i, choice[i]]
        lighter = [o for o in options if nbytes[i, o] < here]
        heavier = [o for o in options if nbytes[i, o] > here]
        for o in (*lighter[-1:], *heavier[:1]):
            moves.append(_Move(i, o, table[i, o] - table[i, choice[i]], nbytes[i, o] - here))
    moves = [move for move in moves if move.nats * move.nbytes < 0]
    if not moves:
        return []
    # The rate at which the plan exchanges nats for bytes lies between the best step up that it could not afford and the
    # cheapest step down that it did not have to take.
    up = [-move.nats / move.nbytes for move in moves if move.nbytes > 0]
    down = [-move.nats / move.nbytes for move in moves if move.nbytes < 0]
    rate = np.mean([*sorted(up)[-1:], *sorted(down)[:1]])
    # Moves near that rate are those that a measurement can turn around.
    moves.sort(key=lambda move: abs(np.log(-move.nats / move.nbytes / rate)))
    return moves[: max(0, most)]


def _hulls(table: Floats, nbytes: Floats, allowed: NDArray[np.bool_]) -> list[list[int]]:
    """The options on each group's hull, lightest first."""
    hull = build_hull(table, nbytes, allowed)
    options = [[int(o)] for o in hull.start]
    for group, option in zip(hull.group.tolist(), hull.option.tolist(), strict=True):
        options[group].append(option)
    return options


def _rates(before: Floats, moves: Sequence[_Move], differences: Sequence[Floats]) -> Floats:
    """Measured over foreseen change [groups, (down, up)], shrunk towards the common rate; that rate where unknown."""
    ratio = np.array([difference.mean() / move.nats for move, difference in zip(moves, differences, strict=True)])
    noise = np.array([_stderr(d) / abs(move.nats) for move, d in zip(moves, differences, strict=True)])
    common = max(float(np.median(ratio)), 0.1)
    spread = (PRIOR * common) ** 2
    shrunk = common + (ratio - common) * spread / (spread + noise**2)  # noise of one window is infinite
    rates = np.where(np.isnan(before), common, before)
    for move, value in zip(moves, shrunk, strict=True):
        # A move can lower KL against its price (or raise it); the sign of a price must survive.
        rates[move.group, int(move.nbytes > 0)] = max(value, 0.05 * common)
    return rates


def _swaps(
    table: Floats, prices: Prices, constraints: Sequence[Constraint], allowed: NDArray[np.bool_], choice: Ints,
    rates: Floats, seconds: float,
) -> list[Ints]:  # fmt: skip
    """The best plans under scaled prices with at most 2, 4, 8, ... groups changed, without repetition."""
    rows = np.arange(len(table))
    nbytes = prices.nbytes.astype(np.float64)
    here, weight = table[rows, choice][:, None], nbytes[rows, choice][:, None]
    rate = np.where(nbytes > weight, rates[:, 1:], rates[:, :1])
    scaled = (table - here) * rate
    # Costs are counted from 0 up, as the solver wants them; a constant a group changes nothing.
    finite = np.where(np.isfinite(scaled) & allowed, scaled, np.inf)
    finite = finite - finite.min(1, keepdims=True)
    near = _near(table, nbytes, allowed, choice)
    local = replace(prices, nats=np.where(near, finite, np.inf))
    changed = np.ones_like(table)
    changed[rows, choice] = 0
    result: list[Ints] = []
    width = 2
    while width < 2 * len(table):
        limit = Constraint("swap", f"at most {width} changes", weights=changed, cap=float(width))
        try:
            found = solve(local, [*constraints, limit], seconds=seconds).choice
        except CircuitpressError:
            break
        if not any(np.array_equal(found, other) for other in [choice, *result]):
            result.append(found)
        width *= 2
    return result


def _near(table: Floats, nbytes: Floats, allowed: NDArray[np.bool_], choice: Ints) -> NDArray[np.bool_]:
    """Options at most two steps of the hull from the choice, which is among them."""
    near = np.zeros_like(allowed)
    for i, options in enumerate(_hulls(table, nbytes, allowed)):
        here = nbytes[i, choice[i]]
        lighter = [o for o in options if nbytes[i, o] < here]
        heavier = [o for o in options if nbytes[i, o] > here]
        near[i, [*lighter[-2:], *heavier[:2], choice[i]]] = True
    return near


def _moved(choice: Ints, move: _Move) -> Ints:
    changed = choice.copy()
    changed[move.group] = move.option
    return changed


def _stderr(values: Floats) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("inf")
