"""Probes: whole plans and single changes whose price was frozen first and whose KL is then measured on held-out text.

- A uniform probe rounds every matrix to one format; other plans can be probed beside them. Additivity bends below
  three bits; the curve from predicted to measured KL of these probes corrects the prediction of the plan.
- A single probe changes only one group to one format. It is the causal check of a price: the rank correlation and the
  ratio between prices and these measurements say how far the prices can be trusted on this model.

All probes of a model are variants in one forward walk (score/variants.py). Plans share the rounding of a matrix in a
format, so a hundred plans round little more than one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor, nn

from .anatomy import Matrix
from .console import Advance, ignore
from .formats import CastFormat, parse
from .hooks import replace, weight_of
from .lean import Lean, pulls
from .outer import load_hessian, round_outer
from .prefix import Beside, Prefix
from .price import permute_inputs, permute_neurons
from .quantize import quantize_everywhere, quantize_matrix
from .rounding import Entry, block_hessians, context, decoded_in_place, round_block, segments_by_module
from .score.variants import Edit, Edits, measure
from .stream import Stream
from .units import OUTER, Axis, Decision, Group, Prices, Probe

_Layout = tuple[Axis, tuple[Entry, ...]]
"""How one matrix is stored: the axis of its segments, and their formats and spans."""
Leans = Mapping[str, Sequence[Lean]]
"""What each plan leans to, by label."""
UPRIGHT: Leans = MappingProxyType({})


def uniform_plan(prices: Prices, form: str) -> tuple[Decision, ...]:
    """The decisions that give every group the format `form`."""
    f = prices.column(form)
    return tuple(
        Decision(group, form, int(prices.nbytes[i, f]), float(prices.nats[i, f]))
        for i, group in enumerate(prices.groups)
    )


def probe(
    stream: Stream, *, calibration: Tensor, held_out: Tensor, prices: Prices, saliency: Path, formats: Sequence[str],
    plans: Mapping[str, Sequence[Decision]] = MappingProxyType({}), polish: bool = True, correct: bool = False,
    beside: Beside = (), advance: Advance = ignore,
) -> list[Probe]:  # fmt: skip
    """Measures the uniform plans of `formats`, and other `plans` by label, on windows `held_out` int64 [n, length].

    `calibration` are the windows that were priced, `saliency` the folder of their shards; `correct` and `beside` as of
    `apply.apply`.
    """
    candidates = {f"uniform {form}": uniform_plan(prices, form) for form in formats} | dict(plans)
    if correct:
        with corrected_edits(
            stream, candidates, calibration=calibration, saliency=saliency, orders=prices.neuron_order, polish=polish,
            beside=beside,
        ) as edits:  # fmt: skip
            measured = measure(stream, held_out, edits, context=calibration, advance=advance)
    else:
        edits = plan_edits(
            stream, candidates, calibration=calibration, saliency=saliency, orders=prices.neuron_order, polish=polish
        )
        measured = measure(stream, held_out, edits, context=context(calibration, saliency), advance=advance)
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


def plan_edits(
    stream: Stream, plans: Mapping[str, Sequence[Decision]], *, calibration: Tensor, saliency: Path,
    orders: Mapping[int, NDArray[np.int64]], polish: bool = True, leans: Leans = UPRIGHT,
) -> Edits:  # fmt: skip
    """Edits for `score.variants.measure`: each of `plans` (by label) as a variant; `calibration` is its context.

    Decisions outside the blocks are for `outer_edits`. What several plans do to a matrix is rounded once. `saliency` is
    the folder of the price shards, `orders` permutes the neurons of some layers (`Prices.neuron_order`). They are
    rounded as `apply` rounds, with `polish` and with the `leans` of each.
    """
    count = len(stream.batches(calibration))
    layouts = {label: segments_by_module(decisions) for label, decisions in plans.items()}
    upright = {label: layout for label, layout in layouts.items() if not leans.get(label)}

    def edits(index: int, module: nn.Module, inputs: Callable[[int], Tensor]) -> Mapping[str, Edit]:
        place, order = stream.anatomy.blocks[index], _order(orders, index)
        hessians = block_hessians(stream, module, place, inputs, count, saliency)
        changes: dict[str, dict[str, Tensor]] = {label: {} for label in plans}
        for label in layouts.keys() - upright.keys():
            pulled = pulls(leans[label], place, stream.device)
            rounded = round_block(module, place, layouts[label], hessians, order, polish=polish, pulled=pulled)
            changes[label] = {n: w.to(stream.dtype) for n, w in decoded_in_place(rounded, place, order).items()}
        for matrix in place.matrices if upright else ():
            wanted = {label: _layout(layout[matrix.module]) for label, layout in upright.items()}
            weight, hessian = weight_of(module, place, matrix).float(), hessians.pop(matrix.module)
            shared = _round(matrix, weight, hessian, set(wanted.values()), order, polish=polish)
            for label, layout in wanted.items():
                changes[label][place.local(matrix)] = shared[layout].to(stream.dtype)
        transposed = place.matrices[0].transposed
        return {label: partial(replace, module, change, transposed=transposed) for label, change in changes.items()}

    return edits


@contextmanager
def corrected_edits(
    stream: Stream, plans: Mapping[str, Sequence[Decision]], *, calibration: Tensor, saliency: Path,
    orders: Mapping[int, NDArray[np.int64]], polish: bool = True, beside: Beside = (), leans: Leans = UPRIGHT,
) -> Iterator[Edits]:  # fmt: skip
    """The same for plans that are rounded as `apply` rounds with `correct`; each has a rounded prefix of its own."""
    batches = stream.batches(calibration)
    layouts = {label: segments_by_module(decisions) for label, decisions in plans.items()}
    stores = {label: stream.store(f"prefix-{n}") for n, label in enumerate(plans)}
    try:
        prefixes = {label: Prefix(stream, batches, store, saliency, beside) for label, store in stores.items()}

        def edits(index: int, module: nn.Module, inputs: Callable[[int], Tensor]) -> Mapping[str, Edit]:
            place, order = stream.anatomy.blocks[index], _order(orders, index)
            transposed, result = place.matrices[0].transposed, {}
            for label, prefix in prefixes.items():
                pulled = pulls(leans.get(label, ()), place, stream.device)
                rounded = prefix.round(module, place, inputs, layouts[label], order, polish=polish, pulled=pulled)
                weights = {name: w.to(stream.dtype) for name, w in decoded_in_place(rounded, place, order).items()}
                prefix.follow(module, place, weights)
                result[label] = partial(replace, module, weights, transposed=transposed)
            return result

        yield edits
    finally:
        for store in stores.values():
            store.clear()


def outer_edits(stream: Stream, plans: Mapping[str, Sequence[Decision]], *, saliency: Path) -> dict[str, Edit]:
    """Edits of embedding and lm_head for those of `plans` that change them; the others' decisions are passed over."""
    rounded: dict[tuple[str, str], Tensor] = {}
    result: dict[str, Edit] = {}
    for label, decisions in plans.items():
        change = {}
        for decision in decisions:
            if decision.group.layer != OUTER or isinstance(parse(decision.format), CastFormat):
                continue
            key = (decision.group.name, decision.format)
            if key not in rounded:
                weight, hessian = stream.outer_weight(key[0]), load_hessian(saliency, key[0]).to(stream.device)
                rounded[key] = round_outer(weight, hessian, key[1]).decode().to(stream.dtype)
            change[key[0]] = rounded[key]
        if change:
            result[label] = partial(stream.outer, change)
    return result


def _layout(found: tuple[str, list[Entry]]) -> _Layout:
    return found[0], tuple(found[1])  # pyright: ignore[reportReturnType]


def _round(
    matrix: Matrix, weight: Tensor, hessian: Tensor, layouts: set[_Layout], order: Tensor | None, *, polish: bool
) -> dict[_Layout, Tensor]:
    """The decoded weights [rows, cols], in the model's order of neurons, of one matrix in each of `layouts`."""
    if order is not None:
        weight, hessian = permute_neurons(matrix.role, weight, order), permute_inputs(matrix.role, hessian, order)
    # Whole matrices go to all their formats in one pass.
    whole = {layout: layout[1][0][0] for layout in layouts if len(layout[1]) == 1}
    formats = sorted(set(whole.values()))
    everywhere = quantize_everywhere(weight, hessian, formats, polish=polish)[0] if whole else {}
    result = {}
    for layout in layouts:
        axis, segments = layout
        if layout in whole:
            quantized = everywhere[whole[layout]]
        else:
            quantized = quantize_matrix(weight, hessian, axis, segments, polish=polish)
        decoded = quantized.decode()
        result[layout] = decoded if order is None else permute_neurons(matrix.role, decoded, torch.argsort(order))
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

    measured = measure(stream, held_out, edits, context=context(calibration, saliency), advance=advance)
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
