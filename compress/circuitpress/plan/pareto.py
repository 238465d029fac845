"""The whole trade-off between bytes and price, for free: every corner of the hull is the best plan of its size."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ..units import Prices
from .constraints import Constraint
from .correction import Curve
from .feasible import join_masks
from .hull import build_hull


@dataclass(frozen=True)
class Point:
    """The best plan of one size; the fields are those of plan.json."""

    bits_per_weight: float
    linear_bytes: int
    predicted_kl: float
    predicted_kl_corrected: float | None

    def to_json(self) -> dict[str, float | int | None]:
        """One entry of pareto.json."""
        return asdict(self)


def pareto(prices: Prices, *, curve: Curve | None = None, constraints: Sequence[Constraint] = ()) -> list[Point]:
    """Every corner of the front, from the smallest plan to the cheapest; more bytes always buy less KL.

    Masks among `constraints` hold; caps are passed over, since the front is what budgets choose from. No point is
    dominated by another, or by any plan at all.
    """
    cost = prices.nats.clip(min=0)
    hull = build_hull(cost, prices.nbytes.astype(np.float64), join_masks(prices, constraints))
    rows = np.arange(len(cost))
    start = int(prices.nbytes[rows, hull.start].sum())
    nbytes = start + np.concatenate([[0], np.cumsum(hull.weight.astype(np.int64))])
    # Summed from the cheap end, so that the small differences there do not drown in the large sums.
    end = cost[rows, hull.start].copy()
    np.subtract.at(end, hull.group, hull.gain)
    floor = float(end.clip(min=0).sum())
    nats = floor + np.concatenate([np.cumsum(hull.gain[::-1])[::-1], [0.0]])
    corrected = [None] * len(nats) if curve is None else curve.apply(nats).tolist()
    numel = prices.linear_numel
    rows_of = zip(nbytes.tolist(), nats.tolist(), corrected, strict=True)
    return [Point(8 * size / numel, size, kl, better) for size, kl, better in rows_of]


def thin(points: Sequence[Point], *, most: int = 40) -> list[Point]:
    """At most `most` (2 or more) of `points`, evenly spread over bits per weight, both ends kept."""
    if len(points) <= most:
        return list(points)
    bits = np.array([point.bits_per_weight for point in points])
    wanted = np.linspace(bits[0], bits[-1], most)
    kept = np.unique(np.abs(bits[:, None] - wanted).argmin(0))
    return [points[i] for i in kept]
