"""Integrated gradients over activations: each unit's own way from clean to corrupted. Evidence: gradient.

One site of one block at a time (all heads, or all neurons) goes straight from its clean value z to its corrupted value
z' while everything before it stays clean:

    effect = sum_t (z'_t - z_t) . 1/m sum_k dm/dz_t  at  z + (k - 1/2)/m (z' - z)

The effects of a site add up to what patching the whole site does, exactly in the limit of many steps: the
path integral's completeness, which interpolated inputs do not have for single sites. It costs a walk down from the top
to each block, m times for each of its two sites, where `gradients.py` needs one walk in all.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..behaviors import Behavior
from ..console import Advance, ignore
from ..hooks import gate
from ..store import Store
from ..stream import Stream
from ..units import Scores
from .gradients import unit_effects
from .metrics import fold, metric_gradients
from .results import to_scores
from .walk import (
    SITES,
    Change,
    Pull,
    Site,
    ascend,
    base_inputs,
    clean_inputs,
    descend,
    final_states,
    own_reference,
    replaced_sites,
    site_modules,
)


def activation_gradients(
    stream: Stream, behavior: Behavior, *, steps: int = 10, change: Change = "resample", advance: Advance = ignore
) -> Scores:
    """Effects of all heads, key-value groups and neurons, by integrated gradients over activations.

    ValueError for `steps` below 1. `advance` hears of every block once.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: integrated gradients need at least one point")
    store, own = stream.store("activations"), stream.store("activations-paths")
    try:
        ascend(stream, {"clean": clean_inputs(stream, behavior), "base": base_inputs(stream, behavior)}, store)
        reference = own_reference(stream, behavior, final_states(stream, store, "clean"))
        parts = []
        for i in range(stream.depth):
            parts.append(_block(stream, behavior, i, steps, change, store, own, reference))
            own.clear()
            advance(1, f"block {i}")
        effects = fold(behavior, torch.cat(parts, dim=1).T)
    finally:
        store.clear()
        own.clear()
    about = {"steps": steps, "change": change, "path": "activations of one site, clean to corrupted"}
    return to_scores("activation-gradients", "gradient", behavior, stream.anatomy.units(), effects, **about)


def _block(
    stream: Stream, behavior: Behavior, index: int, steps: int, change: Change, store: Store, own: Store,
    reference: Tensor | None,
) -> Tensor:  # fmt: skip
    """Effects [rows, units] of one block."""
    place, names = stream.anatomy.blocks[index], site_modules(stream.anatomy.blocks[index])
    paths: list[tuple[Site, float, str]] = [
        (site, (k + 0.5) / steps, f"{site}-{k}") for site in SITES for k in range(steps)
    ]
    starts: dict[str, list[Tensor]] = {run: [] for _, _, run in paths}

    def inputs(run: str, b: int) -> Tensor:
        return store.get((run, index, b), stream.device)

    with stream.block(index) as module:
        values = list(replaced_sites(stream, behavior, module, place, inputs, change))
        with torch.no_grad():
            for b, (z, other) in enumerate(values):
                for site, share, run in paths:
                    point = torch.lerp(z[site], other[site], share)
                    with gate(module, names[site], lambda _, point=point: point):
                        starts[run].append(stream.run(index, module, inputs("clean", b)))
    ascend(stream, starts, own, first=index + 1)
    gradients = {
        run: metric_gradients(stream, behavior, final_states(stream, own, run), reference=reference) for run in starts
    }
    descend(stream, own, gradients, lambda _, __, ___, pull: _pull_all(pull, gradients), last=index + 1)
    pieces = []
    with stream.block(index) as module:
        for b, (z, other) in enumerate(values):
            total: dict[Site, Tensor] = {site: torch.zeros_like(z[site], dtype=torch.float32) for site in SITES}
            for site, share, run in paths:
                point = torch.lerp(z[site], other[site], share).requires_grad_(True)
                with torch.enable_grad(), gate(module, names[site], lambda _, point=point: point):
                    output = stream.run(index, module, inputs("clean", b))
                total[site] += torch.autograd.grad(output, point, gradients[run][b])[0].float() / steps
            gap: dict[Site, Tensor] = {site: other[site] - z[site] for site in SITES}
            pieces.append(unit_effects(place, gap, total))
    return torch.cat(pieces)


def _pull_all(pull: Pull, gradients: Mapping[str, list[Tensor]]) -> None:
    for run, batches in gradients.items():
        for b in range(len(batches)):
            pull(run, b)
