"""Controls at equal bytes: what is left of our result if the plan is taken away.

All of them use our own rounding with the same Hessians, so that only the choice of formats differs:

- `control:uniform`: every matrix in the same integer format, groups of 64 (GPTQ with Fisher-weighted Hessians).
- `control:nearest`: the same grids from minimum to maximum without any calibration, as most tools do by default.
- `control:magnitude`: a plan whose prices are the weights' own error |Q(W) - W|^2, without data.
- `control:fisher`: a plan on Fisher prices alone: no protected circuits, no measured swaps, no refinement.
- `control:random`: formats drawn at random until the bytes are spent.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..console import Advance, ignore
from ..errors import CircuitpressError
from ..evaluate.divergence import Divergence
from ..formats import IntFormat, parse
from ..hooks import replace as replaced
from ..hooks import weight_of
from ..plan import make_plan
from ..probe import plan_edits, uniform_plan
from ..quantize import quantize_everywhere
from ..rounding import context
from ..score.variants import Edit, measure
from ..stream import Stream
from ..units import Decision, Prices
from .jobs import Outcome

UNIFORM = "int{bits}g64"


def control_plans(
    stream: Stream, prices: Prices, budgets: Sequence[float], uniform: Sequence[str], *, offered: Sequence[str],
    seed: int = 0,
) -> tuple[dict[str, Sequence[Decision]], list[Outcome]]:  # fmt: skip
    """Decisions by label `method|budget`, and outcomes that say what each costs (or why there is none).

    Each format of `uniform` that `prices` hold is one control; plans choose among `offered`.
    """
    plans: dict[str, Sequence[Decision]] = {}
    outcomes: list[Outcome] = []
    for name in uniform:
        if name in prices.formats:
            plans[f"control:uniform|{name}"] = uniform_plan(prices, name)
    menu = only(prices, offered)
    tables = {"control:fisher": menu, "control:magnitude": weight_errors(stream, menu)}
    for number, budget in enumerate(budgets):
        for method, table in tables.items():
            label = f"{method}|{budget:.4g} bits"
            try:
                plan = make_plan(table, budget=f"{budget:.9f}bpw", other_bytes=stream.anatomy.other_bytes)
            except CircuitpressError as error:
                outcomes.append(_outcome(label, (), error=error.message))
            else:
                plans[label] = plan.decisions
        cap = int(budget * stream.anatomy.linear_numel / 8)
        chosen = random_choice(menu.nbytes, cap, seed=seed + number)
        label = f"control:random|{budget:.4g} bits"
        if chosen is None:
            outcomes.append(_outcome(label, (), error=f"no random plan fits {cap} bytes"))
        else:
            plans[label] = _decide(menu, chosen)
    return plans, [*(_outcome(label, decisions) for label, decisions in plans.items()), *outcomes]


def measure_controls(
    stream: Stream, windows: Tensor, plans: Mapping[str, Sequence[Decision]], *, calibration: Tensor, saliency: Path,
    prices: Prices, together: int = 8, advance: Advance = ignore,
) -> dict[str, Divergence]:  # fmt: skip
    """The divergence of every plan of `control_plans` on `windows`, and of round-to-nearest beside each uniform one."""
    found: dict[str, Divergence] = {}
    labels = list(plans)
    parts = [labels[at : at + together] for at in range(0, len(labels), together)]
    for part in parts:
        edits = plan_edits(
            stream, {label: plans[label] for label in part}, calibration=calibration, saliency=saliency,
            orders=prices.neuron_order,
        )  # fmt: skip
        found |= measure(
            stream, windows, edits, context=context(calibration, saliency),
            advance=lambda n, note: advance(n / (len(parts) + 1), note),
        )  # fmt: skip
    names = [label.partition("|")[2] for label in labels if label.startswith("control:uniform")]
    if names:
        nearest = partial(_nearest_edits, stream, names)
        found |= measure(stream, windows, nearest, advance=lambda n, note: advance(n / (len(parts) + 1), note))
    return found


def only(prices: Prices, formats: Sequence[str]) -> Prices:
    """The table of prices with no other columns than `formats`."""
    columns = [k for k, name in enumerate(prices.formats) if name in formats]
    cut = {name: getattr(prices, name)[:, columns] for name in ("nbytes", "nats", "nats_sequence", "stderr")}
    return replace(prices, formats=tuple(prices.formats[k] for k in columns), **cut)


@torch.no_grad()
def weight_errors(stream: Stream, prices: Prices) -> Prices:
    """`prices` with |Q(W) - W|^2 of every group instead of nats, rounded without data (the identity as Hessian)."""
    errors = np.zeros_like(prices.nats)
    rows = {(group.name, group.layer): i for i, group in enumerate(prices.groups)}
    for place in stream.anatomy.blocks:
        mine = [group for group in prices.groups if group.layer == place.index]
        with stream.block(place.index) as module:
            for matrix in place.matrices:
                weight = weight_of(module, place, matrix).float()
                rounded, _ = quantize_everywhere(weight, torch.eye(matrix.cols, device=weight.device), prices.formats)
                for k, form in enumerate(prices.formats):
                    squares = (rounded[form].decode() - weight).square()
                    for group in mine:
                        for s in group.segments:
                            if s.module == matrix.module:
                                part = squares.narrow(0 if s.axis == "rows" else 1, s.start, s.stop - s.start)
                                errors[rows[group.name, group.layer], k] += float(part.sum())
    return replace(prices, nats=errors, nats_sequence=errors, stderr=np.zeros_like(errors))


def random_choice(nbytes: NDArray[np.int64], cap: int, *, seed: int) -> NDArray[np.int64] | None:
    """A column for each row of `nbytes` [groups, formats], drawn so that the sum is at most `cap` and near it.

    Starts from the lightest plan and lifts groups drawn at random to formats drawn at random for as long as any fits.
    None if the lightest plan is too heavy.
    """
    draw = np.random.default_rng(seed)
    choice = nbytes.argmin(1)
    rows = np.arange(len(nbytes))
    left = cap - int(nbytes[rows, choice].sum())
    if left < 0:
        return None
    while True:
        extra = nbytes - nbytes[rows, choice][:, None]
        group, option = np.nonzero((extra > 0) & (extra <= left))
        if len(group) == 0:
            return choice
        # A group first, then one of its formats: drawing pairs would favour groups with many light formats.
        picked = draw.choice(np.unique(group))
        column = draw.choice(option[group == picked])
        left -= int(extra[picked, column])
        choice[picked] = column


def nearest(weight: Tensor, form: IntFormat) -> Tensor:
    """Round-to-nearest on the grid from minimum to maximum of each group of columns, with a float16 scale."""
    pieces = []
    for group in weight.split(form.group_size, dim=1):
        low, high = group.amin(1, keepdim=True).clamp(max=0), group.amax(1, keepdim=True).clamp(min=0)
        scale = ((high - low) / (2**form.bits - 1)).half().float().clamp(min=2**-24)
        zero = (-low / scale).round()
        pieces.append(((group / scale + zero).round().clamp(0, 2**form.bits - 1) - zero) * scale)
    return torch.cat(pieces, 1)


def _nearest_edits(
    stream: Stream, names: Sequence[str], index: int, module: nn.Module, inputs: Callable[[int], Tensor]
) -> Mapping[str, Edit]:
    del inputs
    place = stream.anatomy.blocks[index]
    edits: dict[str, Edit] = {}
    for name in names:
        form = parse(name)
        assert isinstance(form, IntFormat)
        weights = {place.local(m): nearest(weight_of(module, place, m).float(), form) for m in place.matrices}
        transposed = place.matrices[0].transposed
        edits[f"control:nearest|{name}"] = partial(replaced, module, weights, transposed=transposed)
    return edits


def _decide(prices: Prices, choice: NDArray[np.int64]) -> tuple[Decision, ...]:
    return tuple(
        Decision(group, prices.formats[j], int(prices.nbytes[i, j]), float(prices.nats[i, j]))
        for i, (group, j) in enumerate(zip(prices.groups, choice.tolist(), strict=True))
    )


def _outcome(label: str, decisions: Sequence[Decision], error: str | None = None) -> Outcome:
    method, _, budget = label.partition("|")
    nbytes = sum(decision.nbytes for decision in decisions)
    return Outcome(method, budget, None, nbytes, 0.0, 0.0, {}, {}, error=error)
