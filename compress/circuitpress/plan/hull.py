"""The lower convex hull of every group's options, and the order in which a growing budget buys its steps.

For one cap, minimising cost + lambda x weight picks, in every group, a corner of the lower convex hull of its options
(weight, cost). As lambda falls, groups step along their hulls; each step has a ratio, the cost it saves per weight. So

1. start every group at its lightest option,
2. walk all hulls at once (gift wrapping, one vectorised pass per step, at most formats - 1 passes),
3. sort all steps by ratio, steepest first.

A prefix of that order is the optimum for the weight it uses: the whole Pareto front comes from one sort, and the first
step that no longer fits gives the linear relaxation's optimum, a lower bound on every plan (Sinha and Zoltners 1979,
https://doi.org/10.1287/opre.27.3.503). A bisection on lambda would find the same prefix, one budget at a time.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Hull:
    """The hulls of n groups and their steps in buying order.

    `start[n]` is each group's lightest option. Step s takes group `group[s]` to `option[s]`, adds `weight[s]` > 0
    and saves `gain[s]` > 0. `ratio[s]` = gain / weight never rises.
    """

    start: NDArray[np.int64]
    group: NDArray[np.int64]
    option: NDArray[np.int64]
    weight: NDArray[np.float64]
    gain: NDArray[np.float64]
    ratio: NDArray[np.float64]


def build_hull(cost: NDArray[np.float64], weight: NDArray[np.float64], allowed: NDArray[np.bool_]) -> Hull:
    """The hulls of `cost` and `weight` [groups, options] over the `allowed` options; every group must have one.

    Options that cost more than a lighter one are never on the hull: prices need not fall with bytes. Of equal options
    the first is taken.
    """
    rows = np.arange(len(cost))
    heavy = np.where(allowed, weight, np.inf)
    lightest = heavy.min(1)
    start = np.argmin(np.where(heavy == lightest[:, None], cost, np.inf), axis=1)
    now, steepest = start, np.full(len(cost), np.inf)
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]] = []
    ratios: list[NDArray[np.float64]] = []
    for _ in range(cost.shape[1] - 1):
        more = weight - weight[rows, now][:, None]
        less = cost[rows, now][:, None] - np.where(allowed, cost, np.inf)
        ratio = np.divide(less, more, out=np.zeros_like(cost), where=(more > 0) & (less > 0))
        best = ratio.max(1)
        # Among options on one line the nearest comes first, which leaves finer steps to fill a budget with.
        to = np.argmin(np.where((ratio == best[:, None]) & (ratio > 0), more, np.inf), axis=1)
        moved = np.flatnonzero(best > 0)
        if not len(moved):
            break
        steepest = np.minimum(steepest, best)  # rounding must not let a later step of a group overtake an earlier one
        steps.append((moved, to[moved], more[moved, to[moved]], less[moved, to[moved]]))
        ratios.append(steepest[moved])
        now = np.where(best > 0, to, now)
    if not steps:
        empty = np.zeros(0)
        return Hull(start, empty.astype(np.int64), empty.astype(np.int64), empty, empty, empty)
    group, option, added, gain = (np.concatenate(part) for part in zip(*steps, strict=True))
    ratio = np.concatenate(ratios)
    order = np.argsort(-ratio, kind="stable")  # stable: the steps of one group stay in order
    return Hull(start, group[order], option[order], added[order], gain[order], ratio[order])


def take(hull: Hull, count: int) -> NDArray[np.int64]:
    """The options [groups] after the first `count` steps."""
    choice = hull.start.copy()
    choice[hull.group[:count]] = hull.option[:count]  # of repeated groups the last assignment, the furthest step, wins
    return choice
