"""From the sum of prices to the KL that is measured: one monotone curve through a few probes.

Prices are second-order and additive; below 3 bits whole plans cost more (or less) than that sum. Uniform plans at 2, 3
and 4 bits are measured on calibration text and fix the relation:

1. log(measured) against log(predicted), since both span orders of magnitude and the ratio between them moves slowly;
2. where probes disagree with a rising curve, isotonic regression pools them;
3. between probes a monotone cubic (PCHIP, Fritsch and Carlson 1980); outside, the ratio of the end probe is held, as a
   line continued there would invent a power law from two points.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..units import Probe


@dataclass(frozen=True)
class Curve:
    """Knots of the curve, both rising: `predicted` strictly, `measured` weakly. Without knots it is the identity."""

    predicted: tuple[float, ...]
    measured: tuple[float, ...]

    @classmethod
    def fit(cls, probes: Sequence[Probe]) -> "Curve":
        """The curve through `probes`; those without a ratio (zero, negative or not finite) are left out."""
        pairs = np.array([(probe.predicted_kl, probe.measured_kl) for probe in probes], dtype=np.float64).reshape(-1, 2)
        pairs = pairs[(np.isfinite(pairs) & (pairs > 0)).all(1)]
        if not len(pairs):
            return cls((), ())
        from scipy.optimize import isotonic_regression

        x, place, count = np.unique(np.log(pairs[:, 0]), return_inverse=True, return_counts=True)
        y = np.bincount(place, np.log(pairs[:, 1])) / count
        y = isotonic_regression(y, weights=count.astype(np.float64)).x
        return cls(tuple(np.exp(x).tolist()), tuple(np.exp(y).tolist()))

    def __call__(self, kl: float) -> float:
        """The KL to expect, in nats per predicted token, where prices add up to `kl`."""
        return float(self.apply(kl))

    def apply(self, kl: ArrayLike) -> NDArray[np.float64]:
        """`__call__` for an array of any shape; zero stays zero."""
        values = np.asarray(kl, dtype=np.float64)
        if not self.predicted:
            return values.copy()
        x, y = np.log(self.predicted), np.log(self.measured)
        inside = np.clip(np.log(np.maximum(values.ravel(), np.finfo(np.float64).tiny)), x[0], x[-1])
        ratio = np.exp(_interpolate(x, y, inside) - inside)
        return np.asarray(values * ratio.reshape(values.shape))

    def to_json(self) -> dict[str, list[float]]:
        """{"predicted": [...], "measured": [...]}."""
        return {"predicted": list(self.predicted), "measured": list(self.measured)}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Curve":
        """The inverse of `to_json`."""
        return cls(tuple(document["predicted"]), tuple(document["measured"]))


def _interpolate(x: NDArray[np.float64], y: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    if len(x) == 1:
        return np.broadcast_to(y, at.shape)
    from scipy.interpolate import PchipInterpolator

    return np.asarray(PchipInterpolator(x, y)(at), dtype=np.float64)
