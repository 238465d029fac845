"""What each feature of an SAE contributes to an objective: first order, integrated, and exactly.

With x = sum_f a_f d_f + bias + error (d_f in the frame of the activations) and g the gradient of the objective at x,

    g . x = sum_f a_f (g . d_f) + g . bias + g . error          (Marks et al., arXiv 2403.19647)

holds exactly, so first-order contributions with bias and error are a full account of g . x. They are not an account of
the objective: where attention or a norm is saturated, the gradient at x says little about what closing a feature
does. Of the eight features that mattered most to the loss of a 14 M model (residual stream, block 4 of 8) it had
the wrong sign for five, the path for none; the path was up to 24 times too large, since it closes all features
together. So:

1. `first_order`: one gradient. Cheap, a prefilter.
2. `integrated`: the gradient is averaged over the path from all features closed (bias + error alone) to x, midpoint
   rule. Contributions then sum to the difference of the objective between the ends (completeness); `gap` is what the
   rule missed of it.
3. `closed`: the features that matter most are closed one at a time, and the objective is measured. That is causal.

The effect of closing a feature is minus its contribution. Contributions at the `skip` first positions are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...console import Advance, ignore
from ...stream import Stream
from ..flow import Objective, Point, flows
from .judge import require_fit
from .value import Sae


@dataclass(frozen=True)
class Contributions:
    """Sums over tokens of one micro-batch or of all: `features` [n], `bias` and `error`, in units of the objective.

    `evidence` is `gradient` for all of them. `gap` is the objective's difference between the ends of the path minus
    the sum of the features' contributions (integrated only).
    """

    features: Tensor
    bias: float
    error: float
    method: Literal["first_order", "integrated"]
    gap: float | None = None
    evidence: Literal["gradient"] = "gradient"


def split(sae: Sae, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Contributions of features [..., n], bias [...] and error [...] to g . x; both are [..., d]."""
    a, frame = sae.encode(x)
    g = g.to(a.dtype)
    features = a * ((g * frame.scale) @ sae.directions(a.dtype).to(a.device).T)
    rest = sae.b_dec.to(a.device, a.dtype) * frame.scale + frame.shift
    return features, (g * rest).sum(-1), (g * (x.to(a.dtype) - sae.decode(a, frame))).sum(-1)


def first_order(
    stream: Stream, batches: Sequence[Tensor], sae: Sae, objective: Objective, *, advance: Advance = ignore
) -> Contributions:
    """Contributions a_f (g . d_f) with the gradient at the activations that are there."""
    flow = flows(stream, batches, require_fit(stream, sae), objective, advance=advance)[0]
    total, bias, error = torch.zeros(sae.latents, dtype=torch.float64), 0.0, 0.0
    for x, g in zip(flow.x, flow.g, strict=True):
        features, b, e = split(sae, x[:, sae.skip :], g[:, sae.skip :])
        total += features.flatten(0, -2).double().sum(0).cpu()
        bias, error = bias + float(b.double().sum()), error + float(e.double().sum())
    return Contributions(total, bias, error, "first_order")


def integrated(
    stream: Stream, batches: Sequence[Tensor], sae: Sae, objective: Objective, *, steps: int = 10,
    advance: Advance = ignore,
) -> Contributions:  # fmt: skip
    """Contributions a_f (mean g . d_f) over the path from all features closed to x; bias and error are at both ends."""
    site = require_fit(stream, sae)

    def at(share: float) -> Point:
        return lambda _, x: _scaled(sae, x, share)

    middles = [at((step + 0.5) / steps) for step in range(steps)]
    *inside, low, high = flows(stream, batches, site, objective, [*middles, at(0.0), at(1.0)], advance=advance)
    total = torch.zeros(sae.latents, dtype=torch.float64)
    for b, x in enumerate(high.x):
        g = torch.stack([flow.g[b].double() for flow in inside]).mean(0)
        total += split(sae, x[:, sae.skip :], g[:, sae.skip :])[0].flatten(0, -2).double().sum(0).cpu()
    ends = sum(float(v.double().sum() - u.double().sum()) for u, v in zip(low.values, high.values, strict=True))
    return Contributions(total, 0.0, 0.0, "integrated", gap=ends - float(total.sum()))


def closed(
    stream: Stream, batches: Sequence[Tensor], sae: Sae, objective: Objective, features: Sequence[int], *,
    advance: Advance = ignore,
) -> Tensor:  # fmt: skip
    """objective(closed) - objective(as it is) for each of `features`, summed over all sequences: float64 [len].

    A feature is closed by taking a_f d_f away, so that the error stays what it was. Evidence: causal.
    """
    site = require_fit(stream, sae)

    def without(feature: int) -> Point:
        return lambda _, x: _without(sae, x, feature)

    points = [lambda _, x: x, *(without(feature) for feature in features)]
    found = flows(stream, batches, site, objective, points, gradients=False, advance=advance)
    sums = torch.stack([sum((v.double().sum() for v in flow.values), torch.zeros(())) for flow in found]).cpu()
    return sums[1:] - sums[0]


def _scaled(sae: Sae, x: Tensor, share: float) -> Tensor:
    """x with every feature at `share` of its activation; bias and error stay."""
    if share == 1.0:
        return x
    rows = x[:, sae.skip :]
    a, frame = sae.encode(rows)
    written = (a @ sae.directions(a.dtype).to(a.device)) * frame.scale
    return torch.cat([x[:, : sae.skip], (rows - (1 - share) * written).to(x.dtype)], 1)


def _without(sae: Sae, x: Tensor, feature: int) -> Tensor:
    rows = x[:, sae.skip :]
    a, frame = sae.encode(rows)
    written = a[..., feature, None] * sae.directions(a.dtype).to(a.device)[feature] * frame.scale
    return torch.cat([x[:, : sae.skip], (rows - written).to(x.dtype)], 1)
