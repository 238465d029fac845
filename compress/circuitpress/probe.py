"""Probes: whole plans and single changes whose price was frozen first and whose KL is then measured on held-out text.

- A uniform probe rounds every matrix to one format. Additivity bends below three bits; the curve from predicted to
  measured KL of these probes corrects the prediction of the plan.
- A single probe changes only one group to one format. It is the causal check of a price: the rank correlation and the
  ratio between prices and these measurements say how far the prices can be trusted on this model.

All probes of a model are variants in one forward walk (score/variants.py).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor, nn

from .anatomy import Block
from .console import Advance, ignore
from .hooks import replace, weight_of
from .price import permute_inputs, permute_neurons
from .quantize import quantize_everywhere
from .rounding import block_hessians, decoded_in_place, round_block, segments_by_module
from .score.variants import Edit, measure
from .stream import Stream
from .units import Decision, Group, Prices, Probe


def uniform_plan(prices: Prices, form: str) -> tuple[Decision, ...]:
    """The decisions that give every group the format `form`."""
    f = prices.column(form)
    return tuple(
        Decision(group, form, int(prices.nbytes[i, f]), float(prices.nats[i, f]))
        for i, group in enumerate(prices.groups)
    )


def probe(
    stream: Stream, *, calibration: Tensor, held_out: Tensor, prices: Prices, saliency: Path, formats: Sequence[str],
    advance: Advance = ignore,
) -> list[Probe]:  # fmt: skip
    """Measures the uniform plans of `formats` on windows `held_out` int64 [n, length].

    `calibration` are the windows that were priced, `saliency` the folder of their shards.
    """
    candidates = {f"uniform {form}": uniform_plan(prices, form) for form in formats}
    count = len(stream.batches(calibration))

    def edits(index: int, module: nn.Module, inputs: Callable[[int], Tensor]) -> Mapping[str, Edit]:
        place = stream.anatomy.blocks[index]
        hessians = block_hessians(stream, module, place, inputs, count, saliency)
        rounded = _uniform_roundings(prices, module, place, hessians, formats)
        return {
            f"uniform {form}": partial(replace, module, weights, transposed=place.matrices[0].transposed)
            for form, weights in rounded.items()
        }

    measured = measure(stream, held_out, edits, context=calibration, advance=advance)
    numel = stream.anatomy.linear_numel
    return [
        Probe(
            label=label,
            bits_per_weight=8 * sum(decision.nbytes for decision in decisions) / numel,
            predicted_kl=sum(decision.nats for decision in decisions),
            measured_kl=measured[label].kl,
        )
        for label, decisions in candidates.items()
    ]


def _uniform_roundings(
    prices: Prices, module: nn.Module, place: Block, hessians: Mapping[str, Tensor], formats: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """The weights of a block by format and local name. Whole matrices go to all formats in one pass."""
    order = _order(prices.neuron_order, place.index)
    groups = [group for group in prices.groups if group.layer == place.index]
    result: dict[str, dict[str, Tensor]] = {form: {} for form in formats}
    if any(segment.axis == "cols" for group in groups for segment in group.segments):
        for form in formats:
            layout = segments_by_module([Decision(group, form, 0, 0.0) for group in groups])
            result[form] = decoded_in_place(round_block(module, place, layout, hessians, order), place, order)
        return result
    for matrix in place.matrices:
        weight = weight_of(module, place, matrix).float()
        rounded, _ = quantize_everywhere(weight, hessians[matrix.module], formats)
        for form, quantized in rounded.items():
            result[form][place.local(matrix)] = quantized.decode()
    return result


def choose_singles(prices: Prices, formats: Sequence[str], fraction: float, *, seed: int = 0) -> list[tuple[int, str]]:
    """Which (group, format) to check: half of them the dearest, the rest drawn at random from the others.

    Formats that cost nothing (the checkpoint's own type) are left out: there is no ratio to a price of zero.
    """
    everything = [
        (i, form) for form in formats for i in range(len(prices.groups)) if prices.nats[i, prices.column(form)]
    ]
    count = min(len(everything), round(fraction * len(everything)))
    nats = np.array([prices.nats[i, prices.column(form)] for i, form in everything])
    ranked = np.argsort(-nats, kind="stable")
    top = ranked[: (count + 1) // 2]
    rest = np.random.default_rng(seed).permutation(ranked[(count + 1) // 2 :])[: count // 2]
    return [everything[k] for k in sorted([*top, *rest])]


def exact(
    stream: Stream, *, calibration: Tensor, held_out: Tensor, prices: Prices, saliency: Path,
    singles: Sequence[tuple[int, str]], advance: Advance = ignore,
) -> dict[str, Any]:  # fmt: skip
    """Measures "change only this group" for each (group index, format) and compares with its price.

    Returns the content of exact.json: rows, `spearman` (rank correlation of price and KL) and `median_ratio` (KL over
    price). Both are NaN for fewer than three rows.
    """
    count = len(stream.batches(calibration))
    by_layer: dict[int, list[tuple[int, str]]] = {}
    for i, form in singles:
        by_layer.setdefault(prices.groups[i].layer, []).append((i, form))

    def edits(index: int, module: nn.Module, inputs: Callable[[int], Tensor]) -> Mapping[str, Edit]:
        mine = by_layer.get(index, [])
        if not mine:
            return {}
        place = stream.anatomy.blocks[index]
        order = _order(prices.neuron_order, index)
        hessians = block_hessians(stream, module, place, inputs, count, saliency)
        forms = sorted({form for _, form in mine})
        matrices = {matrix.module: matrix for matrix in place.matrices}
        result: dict[str, Edit] = {}
        for name in sorted({prices.groups[i].segments[0].module for i, _ in mine}):
            matrix, hessian = matrices[name], hessians[name]
            weight = weight_of(module, place, matrix).float()
            if order is not None:
                weight = permute_neurons(matrix.role, weight, order)
                hessian = permute_inputs(matrix.role, hessian, order)
            rounded, _ = quantize_everywhere(weight, hessian, forms)
            for i, form in mine:
                group = prices.groups[i]
                if group.segments[0].module == name:
                    changed = _only(group, weight, rounded[form].decode())
                    if order is not None:
                        changed = permute_neurons(matrix.role, changed, torch.argsort(order))
                    edit = partial(replace, module, {place.local(matrix): changed}, transposed=matrix.transposed)
                    result[f"{i}:{form}"] = edit
        return result

    measured = measure(stream, held_out, edits, context=calibration, advance=advance)
    rows = [
        {
            "group": prices.groups[i].name,
            "format": form,
            "price": float(prices.nats[i, prices.column(form)]),
            "exact_kl": measured[f"{i}:{form}"].kl,
        }
        for i, form in singles
    ]
    prices_, kls = (np.array([row[name] for row in rows]) for name in ("price", "exact_kl"))
    enough = len(rows) >= 3
    return {
        "rows": rows,
        "spearman": float(np.corrcoef(rankdata(prices_), rankdata(kls))[0, 1]) if enough else float("nan"),
        "median_ratio": float(np.median(kls / prices_)) if enough else float("nan"),
    }


def _only(group: Group, weight: Tensor, rounded: Tensor) -> Tensor:
    """`weight` with nothing but the group's segments taken from `rounded`."""
    changed = weight.clone()
    for segment in group.segments:
        span = slice(segment.start, segment.stop)
        index = (span, slice(None)) if segment.axis == "rows" else (slice(None), span)
        changed[index] = rounded[index]
    return changed


def _order(orders: Mapping[int, NDArray[np.int64]], layer: int) -> Tensor | None:
    return torch.from_numpy(orders[layer]) if layer in orders else None
