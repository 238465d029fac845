"""Features of an SAE as something that rounding should spare: their Hessians and the units that write them.

A change dx of the residual stream changes the activations of features by da. With w_f nats per squared activation,

    cost = 1/2 E_t [ sum_f w_f da_f^2 ]

is to features what the Fisher price is to predictions, so it takes the same path through the model:

1. Forward, then the text's own gradients (labels drawn from the model) down to the SAE's site. There
   c_f = 1/2 E_t [(a_f g . d_f)^2] is what closing feature f costs, and w_f = E[(g . d_f)^2] over the tokens on which it
   fires what a unit of its activation does; the `top` features by c_f keep their w_f, all others get none.
2. From there down another gradient: that of sum_f e_f sqrt(w_f) a_f with random signs e_f for each token. The expected
   square of (this gradient . dx) is sum_f w_f da_f^2, as the drawn labels' is the Fisher's (Hutchinson 1990).
3. Every matrix below gets H = E[s x x^T] from that gradient, in nats like the text's own, to be added to it times a
   weight (`price(beside=...)`), and every unit the cost of closing it: a score of who writes the features.

What is above the site cannot change them and gets nothing. An activation's derivative is that of the features that
fire: features that would begin to fire are not seen.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from .console import Advance, ignore
from .errors import CircuitpressError
from .files import write_bytes_atomic
from .mech.sae import Sae
from .mech.sae.judge import require_fit
from .price import BlockPricer, shard_path
from .score.fisher import output_gradients, pull
from .store import Store
from .stream import Stream, forward
from .units import Scores

WRITERS = 32
"""Units that the provenance of scores names."""
Keys = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Importance:
    """`closing` [n]: nats per token that closing each feature costs, to second order; `steepness` [n]: nats per squared
    activation, over the tokens on which it fires (0 where it never does); `rate` [n]: the share of such tokens."""

    closing: Tensor
    steepness: Tensor
    rate: Tensor


Choose = Callable[[Importance], Tensor]
"""Weights w [n] float64 of all features, in nats per squared activation; 0 for those that do not matter."""


def strongest(top: int) -> Choose:
    """The `top` features that cost most to close, each with its own steepness."""

    def choose(found: Importance) -> Tensor:
        weights = torch.zeros_like(found.steepness)
        best = found.closing.topk(min(top, len(weights))).indices
        weights[best] = found.steepness[best]
        return weights

    return choose


def price_features(
    stream: Stream, windows: Tensor, sae: Sae, choose: Choose, *, draws: int = 1, seed: int = 0, folder: Path,
    advance: Advance = ignore,
) -> Scores:  # fmt: skip
    """Writes a shard with Hessians for every block that the features depend on, and returns the scores of all units.

    `windows` int64 [n, length]. The scores are nats per token that closing a unit costs through the features with a
    weight; their provenance names these, and as `writers` the heads and neurons that score highest, as `plan.protect`
    takes them. CircuitpressError for an SAE that does not read the residual stream.
    """
    site = require_fit(stream, sae)
    top = {"resid_post": site.layer + 1, "resid_pre": site.layer}.get(site.name, 0)
    if top < 1:
        raise CircuitpressError(
            f"{site}: features are protected where they lie in the residual stream behind a block",
            hint="give an SAE of L<layer>.resid_post, or leave `features` out of the recipe",
        )
    batches = stream.batches(windows)
    hidden, gradients = stream.store("inputs"), stream.store("gradients")
    depth = stream.depth
    try:
        forward(stream, batches, hidden, keep=True, advance=lambda n, note: advance(n / 2, f"forward, {note}"))
        keys = output_gradients(stream, batches, hidden, gradients, draws=draws, seed=seed)
        for index in reversed(range(top, depth)):
            with stream.block(index) as module:
                for b, draw in keys:
                    gradient = gradients.get((b, draw), stream.device)
                    x = hidden.get((index, b), stream.device)
                    gradients.put((b, draw), pull(stream, module, stream.anatomy.blocks[index], x, gradient)[0])
            advance(0.5, f"block {index}")
        weights = choose(importance(stream, sae, hidden, gradients, top, keys)).to(stream.device)
        _feature_gradients(stream, sae, weights, hidden, gradients, top, keys, seed)
        values, errors = [np.zeros(0)], [np.zeros(0)]
        for index in reversed(range(top)):
            place = stream.anatomy.blocks[index]

            def inputs(b: int, index: int = index) -> Tensor:
                return hidden.get((index, b), stream.device)

            with stream.block(index) as module:
                sizes, length = [len(ids) for ids in batches], windows.shape[1]
                pricer = BlockPricer(stream, module, place, inputs, gradients, keys, sizes, length, windows.numel())
                arrays, _ = pricer.price((), (), by_unit=False, order=None, hessians=(), replace=False)
            values.insert(0, arrays["scores"])
            errors.insert(0, arrays["scores_stderr"])
            write_bytes_atomic(shard_path(folder, index), save(arrays, metadata={"notes": json.dumps({})}))
            advance(0.5, f"block {index}")
    finally:
        hidden.clear()
        gradients.clear()
    above = np.zeros(sum(len(place.units()) for place in stream.anatomy.blocks[top:]))
    units, found = stream.anatomy.units(), np.concatenate([*values, above])
    order = [i for i in np.argsort(-found, kind="stable").tolist() if units[i].kind != "kv_group" and found[i] > 0]
    about = {
        "value": "nats per token, through features",
        "site": str(site),
        "features": weights.nonzero()[:, 0].tolist(),
        "draws": draws,
        "writers": [str(units[i]) for i in order[:WRITERS]],
    }
    return Scores("features", "gradient", units, found, np.concatenate([*errors, above]), about)


def importance(stream: Stream, sae: Sae, hidden: Store, gradients: Store, top: int, keys: Keys) -> Importance:
    """What features cost, from the gradients of the text at the output of block `top` - 1."""
    sums = torch.zeros(3, sae.latents, dtype=torch.float64)
    tokens = 0
    for b, draw in keys:
        x = hidden.get((top, b), stream.device)[:, sae.skip :].flatten(0, 1)
        g = gradients.get((b, draw), stream.device)[:, sae.skip :].flatten(0, 1)
        a, frame = sae.encode(x)
        slope = ((g.to(a.dtype) * frame.scale) @ sae.directions(a.dtype).to(a.device).T).double()
        fires = (a > 0).double()
        parts = ((a * slope).square(), fires * slope.square(), fires)
        sums += torch.stack([part.double().sum(0).cpu() for part in parts])
        tokens += len(x)
    return Importance(0.5 * sums[0] / tokens, sums[1] / sums[2].clamp(min=1), sums[2] / tokens)


def _feature_gradients(
    stream: Stream, sae: Sae, weights: Tensor, hidden: Store, gradients: Store, top: int, keys: Keys, seed: int
) -> None:
    """Replaces the gradients at the site by those of the features' activations with random signs and weights."""
    (chosen,) = weights.nonzero(as_tuple=True)
    sizes = weights[chosen].sqrt().float()
    draw_signs = torch.Generator().manual_seed(seed)
    for b, draw in keys:
        x = hidden.get((top, b), stream.device)
        leaf = x[:, sae.skip :].detach().requires_grad_(True)
        shape = (*leaf.shape[:2], len(chosen))
        signs = torch.randint(2, shape, generator=draw_signs).to(stream.device) * 2.0 - 1
        with torch.enable_grad():
            value = (sae.encode(leaf)[0][..., chosen] * signs * sizes).sum()
        gradient = torch.zeros_like(x)
        gradient[:, sae.skip :] = torch.autograd.grad(value, leaf)[0]
        gradients.put((b, draw), gradient)
