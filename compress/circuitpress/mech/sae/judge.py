"""How good an SAE is: what it leaves unexplained, and how much of the model survives its reconstruction.

1. At the site, on text that it was not trained on: FVU = sum |x - x^|^2 / sum |x - mean x|^2, L0 (features per token)
   and the share of features that never fire there. These describe activations; they say nothing of what the model uses.
2. Splicing x^ into the model in place of x is an intervention. With the loss of the model left alone (clean), spliced
   (sae), and with zero or the mean of the activations at the site,

       loss recovered = (CE_zero - CE_sae) / (CE_zero - CE_clean)
       KL score       = 1 - KL(clean || sae) / KL(clean || zero)

   Zero is the field's convention and a weak opponent in the residual stream, where nothing survives it: the mean is
   reported beside it. The first `skip` positions, which the SAE never saw in training, are left alone in all of them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...console import Advance, ignore
from ...errors import CircuitpressError
from ...score.variants import Edit, measure
from ...stream import Stream
from ..sites import Site, rewriting
from .value import Sae

EVIDENCE = {
    "correlational": ["fvu", "l0", "dead_share", "firing_rate"],
    "causal": [
        "ce_clean",
        "ce_sae",
        "ce_zero",
        "ce_mean",
        "loss_recovered",
        "kl_sae",
        "kl_zero",
        "kl_mean",
        "kl_score",
    ],
}


@dataclass(frozen=True)
class SaeQuality:
    """What `judge` measured; losses and KL in nats per predicted token, shares between 0 and 1."""

    tokens: int
    fvu: float
    l0: float
    dead_share: float
    ce_clean: float
    ce_sae: float
    ce_zero: float
    ce_mean: float
    kl_sae: float
    kl_zero: float
    kl_mean: float

    @property
    def loss_recovered(self) -> float:
        """(CE_zero - CE_sae) / (CE_zero - CE_clean); NaN where zeroing the site costs nothing."""
        gap = self.ce_zero - self.ce_clean
        return (self.ce_zero - self.ce_sae) / gap if gap else math.nan

    @property
    def loss_recovered_from_mean(self) -> float:
        """The same against the mean activation."""
        gap = self.ce_mean - self.ce_clean
        return (self.ce_mean - self.ce_sae) / gap if gap else math.nan

    @property
    def kl_score(self) -> float:
        """1 - KL(clean || sae) / KL(clean || zero)."""
        return 1 - self.kl_sae / self.kl_zero if self.kl_zero else math.nan

    def to_json(self) -> dict[str, Any]:
        """All figures, and which of them are causal."""
        derived = ("loss_recovered", "loss_recovered_from_mean", "kl_score")
        return asdict(self) | {name: getattr(self, name) for name in derived} | {"evidence": EVIDENCE}


@dataclass
class _Seen:
    """Sums over the rows of the site."""

    rows: int = 0
    error: float = 0.0
    square: float = 0.0
    active: float = 0.0
    total: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    fired: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))

    def add(self, x: Tensor, a: Tensor, reconstruction: Tensor) -> None:
        x, a, reconstruction = (t.flatten(0, -2).double() for t in (x, a, reconstruction))
        self.rows += x.shape[0]
        self.error += float((x - reconstruction).square().sum())
        self.square += float(x.square().sum())
        self.active += float((a > 0).sum())
        self.total = self.total + x.sum(0).cpu()
        self.fired = self.fired + (a > 0).sum(0).cpu()

    @property
    def variance(self) -> float:
        return self.square - float(self.total.square().sum()) / self.rows


def own_site(sae: Sae) -> Site:
    """The site of an SAE; CircuitpressError if its folder does not say."""
    if sae.site is None:
        raise CircuitpressError("the SAE does not say which site it reads", hint="add --site L4.resid_post")
    return sae.site


def require_fit(stream: Stream, sae: Sae) -> Site:
    """The site of an SAE, if its width is that of the model there; CircuitpressError otherwise."""
    site = own_site(sae)
    if (width := site.width(stream.anatomy)) != sae.width:
        raise CircuitpressError(
            f"the SAE reads {sae.width} numbers per token, {site} of {stream.anatomy.folder.name} has {width}",
            hint="it belongs to another model or another --site",
        )
    return site


def judge(stream: Stream, windows: Tensor, sae: Sae, *, advance: Advance = ignore) -> SaeQuality:
    """The quality of `sae` on windows int64 [n, length] that it was not trained on."""
    site = require_fit(stream, sae)
    seen = _Seen()

    def splice(x: Tensor) -> Tensor:
        rows = x[:, sae.skip :]
        a, frame = sae.encode(rows)
        reconstruction = sae.decode(a, frame).to(x.dtype)
        seen.add(rows, a, reconstruction)
        return torch.cat([x[:, : sae.skip], reconstruction], 1)

    def constant(x: Tensor, value: Tensor) -> Tensor:
        return torch.cat([x[:, : sae.skip], value.to(x).expand_as(x[:, sae.skip :])], 1)

    def edits(index: int, module: nn.Module, inputs: Callable[[int], Tensor]) -> Mapping[str, Edit]:  # noqa: ARG001
        if index != site.layer:
            return {}
        # In this order: a variant meets all micro-batches before the next one, so the mean is known when it is needed.
        changes = {
            "sae": splice,
            "zero": lambda x: constant(x, torch.zeros(1)),
            "mean": lambda x: constant(x, seen.total / seen.rows),
        }
        return {
            name: lambda change=change: rewriting(stream, index, module, site.name, change)
            for name, change in changes.items()
        }

    found = measure(stream, windows, edits, advance=advance)
    losses = {name: math.log(row.perplexity) for name, row in found.items()}
    return SaeQuality(
        tokens=seen.rows,
        fvu=seen.error / seen.variance,
        l0=seen.active / seen.rows,
        dead_share=float((seen.fired == 0).double().mean()),
        ce_clean=math.log(found["sae"].reference_perplexity),
        ce_sae=losses["sae"], ce_zero=losses["zero"], ce_mean=losses["mean"],
        kl_sae=found["sae"].kl, kl_zero=found["zero"].kl, kl_mean=found["mean"].kl,
    )  # fmt: skip
