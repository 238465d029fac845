"""Which features of a frozen SAE survive in another model: the SAE of the reference reads both.

For every feature that fires on at least `FIRES` tokens of the reference, the Pearson correlation over tokens between
its activation in the reference and in the model (arXiv 2606.03002 measures damage that perplexity misses this way). A
feature survives at 0.9. Correlational: a feature that survives is still there, whether or not the model uses it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..console import Advance, ignore
from ..errors import CircuitpressError
from ..mech.sae import Sae
from ..mech.sites import collect
from ..stream import Stream

FIRES = 10
SURVIVES = 0.9


@dataclass(frozen=True)
class Survival:
    """Correlations [features], NaN where a feature fires too rarely to tell; `rates` [2, features] are the shares of
    tokens on which it fires in the reference and in the model."""

    correlation: NDArray[np.float64]
    rates: NDArray[np.float64]
    tokens: int

    @property
    def told(self) -> int:
        """Features that fire often enough."""
        return int(np.isfinite(self.correlation).sum())

    @property
    def survivors(self) -> float:
        """Share of those whose correlation is at least 0.9; NaN if there are none."""
        return float((self.correlation >= SURVIVES).sum() / self.told) if self.told else float("nan")

    def worst(self, count: int) -> Sequence[int]:
        """The features with the lowest correlation, the lowest first."""
        order = np.argsort(np.where(np.isfinite(self.correlation), self.correlation, np.inf), kind="stable")
        return order[: min(count, self.told)].tolist()


@torch.no_grad()
def survival(reference: Stream, model: Stream, sae: Sae, windows: Tensor, *, advance: Advance = ignore) -> Survival:
    """Reads `windows` int64 [n, length] in both models with `sae`, which must say where it reads."""
    if sae.site is None:
        raise CircuitpressError("the SAE does not say where it reads", hint="give --site, such as L4.resid_post")
    batches = reference.batches(windows)
    stores = [collect(stream, batches, [sae.site], advance=advance) for stream in (reference, model)]
    # Sums of a, b, a^2, b^2, ab and of firing, by feature.
    sums = np.zeros((7, sae.latents))
    tokens = 0
    for b in range(len(batches)):
        pair = [sae.encode(store.get((str(sae.site), b))[:, sae.skip :].flatten(0, 1))[0].double() for store in stores]
        x, y = pair
        tokens += len(x)
        parts = (x, y, x.square(), y.square(), x * y, (x > 0).double(), (y > 0).double())
        sums += np.stack([part.sum(0).cpu().numpy() for part in parts])
    mean = sums[:5] / tokens
    covariance = mean[4] - mean[0] * mean[1]
    spread = np.sqrt((mean[2] - mean[0] ** 2).clip(min=0) * (mean[3] - mean[1] ** 2).clip(min=0))
    with np.errstate(invalid="ignore", divide="ignore"):
        # A feature that the model never fires has no spread there: it did not survive.
        correlation = np.where(spread > 0, covariance / spread, 0.0)
    correlation[sums[5] < FIRES] = np.nan
    return Survival(correlation, sums[5:] / tokens, tokens)
