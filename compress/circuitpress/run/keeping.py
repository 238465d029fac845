"""Named behaviors that a run keeps: priced, capped in the plan, and measured on the compressed model.

1. The pairs of a behavior are split in two, by a seeded permutation. One half is priced and watched while planning
   (and refinement learns from it), the other one judges the finished model.
2. `price_behaviors`: KL at the positions where the behavior is decided, as the Fisher price of every group in every
   format; and the Hessian of its prompts, which joins that of the text in all rounding (times `weight`).
3. `keep`: the plan is measured as variants of one walk. For a behavior below its floor, the sum of its prices gets a
   linear cap, half of what the present plan spends on it (three quarters if no plan can do that, and so on), and the
   planner solves again within the same bytes. Caps bind in later solves (swaps) too.
4. `judge`: dense and compressed model on the other half; the floor is `keep` times what the dense model does.

Where no plan of the budget keeps everything, larger ones are measured, so that the error can say what it would take.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..console import Advance
from ..errors import CircuitpressError, InfeasibleBudget, RecipeError
from ..plan import Constraint, Problem, TimeLimit, cap, solve, write_plan
from ..plan.budget import Budget
from ..units import Prices
from .planning import block_prices, correction, on_offer, pose_problem, with_drops

if TYPE_CHECKING:
    import torch

    import circuitpress.behaviors
    import circuitpress.run.session
    import circuitpress.stream

log = logging.getLogger(__name__)

ROUNDS = 8
"""How often caps are tightened, or loosened again where no plan meets them."""
LARGER = (1.1, 1.25, 1.5, 2.0)
"""Budgets, against the one asked for, that are tried to say what keeping a behavior would take."""
PRICED = 128
"""Pairs that are priced at most."""
DRAWS = 4
"""Label draws per position: a behavior has few of them."""


@dataclass(frozen=True)
class Kept:
    """A behavior of the recipe: the halves of its pairs, and what must be left of it."""

    name: str
    watched: "circuitpress.behaviors.Behavior"
    judged: "circuitpress.behaviors.Behavior"
    keep: float
    weight: float
    of: Literal["accuracy", "margin"]

    def folder(self, run: Path) -> Path:
        """Where its Hessians and prices lie."""
        return run / "pricing-behaviors" / self.name


@dataclass(frozen=True)
class Level:
    """How well a model does a behavior: share of right decisions over `pairs`, and their mean margin.

    A margin is a difference of logits, or of log-probabilities of sentences.
    """

    pairs: int
    accuracy: float
    margin: float

    def of(self, what: Literal["accuracy", "margin"]) -> float:
        """The figure that the floor speaks of."""
        return self.accuracy if what == "accuracy" else self.margin


def load_kept(session: "circuitpress.run.session.Session") -> tuple[Kept, ...]:
    """The recipe's behaviors for the model's tokenizer; RecipeError names those that the files do not hold."""
    import torch

    from ..behaviors import load_behaviors

    found, problems = [], []
    unfit: dict[str, str] = {}
    files = {entry.file for entry in session.recipe.behaviors}
    loaded = {path: load_behaviors(path, session.tokenizer, unfit=unfit) for path in files}
    for asked in session.recipe.behaviors:
        known = {behavior.name: behavior for behavior in loaded[asked.file]}
        if asked.name in unfit:
            problems.append(f"behaviors: {asked.name} does not fit this tokenizer: {unfit[asked.name]}")
            continue
        if asked.name not in known:
            problems.append(f"behaviors: {asked.file} has no {asked.name!r}; it has {', '.join(known)}")
            continue
        behavior = known[asked.name]
        if len(behavior) < 8:
            problems.append(f"behaviors: {asked.name} has {len(behavior)} pairs; to plan and to judge takes 8")
            continue
        order = torch.randperm(len(behavior), generator=torch.Generator().manual_seed(session.recipe.data.seed))
        half = len(behavior) // 2
        watched, judged = behavior.take(order[:half][:PRICED]), behavior.take(order[half:])
        found.append(Kept(asked.name, watched, judged, asked.keep, asked.weight, asked.of))
    if problems:
        raise RecipeError(problems, hint="circuitpress check MODEL --behaviors FILE lists what a file holds")
    return tuple(found)


def prompts(behavior: "circuitpress.behaviors.Behavior") -> "tuple[torch.Tensor, torch.Tensor]":
    """The rows of a behavior int64 [rows, length], and at which positions it is decided, bool [rows, length]."""
    import torch

    from ..score.metrics import as_decision, rows_of, sites_of

    decision = as_decision(behavior)
    ids = rows_of(decision)
    sites = sites_of(decision, 0, len(ids))
    positions = torch.zeros_like(ids, dtype=torch.bool)
    positions[sites.row, sites.position] = True
    return ids, positions


def price_hessians(session: "circuitpress.run.session.Session") -> list[tuple[Path, float]]:
    """Walks every behavior's prompts once for their Hessians: shards, and the weight that each has beside the text."""
    from ..price import has_hessians, price

    found = []
    for kept in session.kept:
        _refuse_unable(session, kept)
        ids, positions = prompts(kept.watched)
        folder = kept.folder(session.path) / "hessians"
        price(session.stream, ids, formats=(), draws=DRAWS, folder=folder, positions=positions)
        if has_hessians(folder):
            found.append((folder, kept.weight))
        else:
            log.warning("%s: rounding does not know it: the Hessians of a model so large are not kept", kept.name)
    return found


def price_behaviors(session: "circuitpress.run.session.Session", formats: Sequence[str]) -> None:
    """Prices every group in every format on every behavior, rounded as the text's prices were."""
    from ..plan.targets import rounded_here
    from ..price import has_hessians, price

    pricing = session.path / "pricing"
    for kept in session.kept:
        ids, positions = prompts(kept.watched)
        folder = kept.folder(session.path)
        _, prices = price(
            session.stream, ids, formats=formats, granularity=session.recipe.plan.granularity, draws=DRAWS,
            folder=folder / "prices", positions=positions, neuron_order=session.prices.neuron_order,
            rounded_for=pricing if has_hessians(pricing) else None,
            feedback=rounded_here(session.recipe.plan.target),
        )  # fmt: skip
        offered = {"offered": session.names(session.recipe.plan.formats)}
        replace(prices, provenance=prices.provenance | offered).save(folder / "prices.safetensors")


def caps(session: "circuitpress.run.session.Session") -> list[Constraint]:
    """The caps that the keep stage found, as constraints on the table of blocks."""
    path = session.path / "behaviors.json"
    if not path.exists():
        return []
    found: dict[str, float] = json.loads(path.read_text())["caps"]
    return _caps(session, found)


def keep(session: "circuitpress.run.session.Session") -> None:
    """Caps behaviors until the plan keeps them; writes plan.json and behaviors.json."""
    document: dict[str, Any] = {"caps": {}, "missed": [], "rounds": [], "takes": None}
    if session.kept:
        with session.console.progress("keep", ROUNDS + 1) as advance:
            dense = {kept.name: level(session.original, kept.watched) for kept in session.kept}
            found = _search(session, dense, None, advance)
            document |= asdict(found) | {"dense": {name: asdict(entry) for name, entry in dense.items()}}
            if found.missed:
                document["takes"] = _takes(session, dense, advance)
        problem = _problem(session, found.caps, None)
        plan = write_plan(problem, solve(problem.prices, problem.constraints), curve=correction(session))
        with_drops(plan, session).save(session.path / "plan.json")
    session.write("behaviors.json", document)


def judge(session: "circuitpress.run.session.Session") -> list[dict[str, Any]]:
    """Every behavior on the pairs that nothing else used: dense, compressed, floor, and whether it is kept."""
    model = session.open(session.path / "model")
    rows = []
    for kept in session.kept:
        before, after = level(session.original, kept.judged), level(model, kept.judged)
        least = kept.keep * before.of(kept.of)
        rows.append(
            {
                "name": kept.name,
                "evidence": "causal",
                "pairs": after.pairs,
                "metric": kept.judged.metric,
                "of": kept.of,
                "keep": kept.keep,
                "reference_accuracy": before.accuracy,
                "accuracy": after.accuracy,
                "reference_margin": before.margin,
                "margin": after.margin,
                "kept": after.of(kept.of) >= least,
            }
        )
    return rows


def level(stream: "circuitpress.stream.Stream", behavior: "circuitpress.behaviors.Behavior") -> Level:
    """How well a model does a behavior."""
    from ..score.ability import behavior_values

    return _level(behavior_values(stream, behavior)[1])


def _level(margins: NDArray[np.float64]) -> Level:
    return Level(len(margins), float((margins > 0).mean()), float(margins.mean()))


def _refuse_unable(session: "circuitpress.run.session.Session", kept: Kept) -> None:
    from ..score.ability import ability

    able = ability(session.original, kept.watched)
    if able.accuracy <= 0.5:
        raise CircuitpressError(
            f"behavior {kept.name}: the original decides {able.accuracy:.0%} of {able.pairs} pairs right, no better "
            "than a coin: there is nothing to keep",
            hint="take it out of the recipe; circuitpress check MODEL --behaviors FILE says what the model can do",
        )


@dataclass(frozen=True)
class _Found:
    """Caps in nats by behavior, what their plan still misses, and what was measured on the way.

    Of plans that all miss something, it is the one that misses fewest behaviors, then the one that comes nearest.
    """

    caps: dict[str, float]
    missed: list[str]
    rounds: list[dict[str, Any]]


def _search(
    session: "circuitpress.run.session.Session", dense: Mapping[str, Level], budget: str | None, advance: Advance
) -> _Found:
    tables = {kept.name: _table(session, kept) for kept in session.kept}
    caps: dict[str, float] = {}
    spent: dict[str, float] = {}
    rounds: list[dict[str, Any]] = []
    for _ in range(ROUNDS + 1):
        problem = _problem(session, caps, budget)
        try:
            choice = solve(problem.prices, problem.constraints).choice
        except InfeasibleBudget:
            if not rounds:
                raise
            # Half-way back to the last plan that there was.
            caps = {name: 0.5 * (limit + max(limit, spent[name])) for name, limit in caps.items()}
            continue
        measured = _measure(session, problem, choice)
        left = {k.name: measured[k.name].of(k.of) / (k.keep * dense[k.name].of(k.of)) for k in session.kept}
        missed = [name for name, share in left.items() if share < 1]
        levels = {name: asdict(entry) for name, entry in measured.items()}
        short = sum(1 - left[name] for name in missed)
        rounds.append({"caps": caps, "measured": levels, "missed": missed, "short": short})
        advance(1, f"{len(missed)} of {len(session.kept)} behaviors below their floors")
        if not missed:
            break
        inside = np.arange(len(problem.prices.groups))[: len(next(iter(tables.values())))]
        spent = {name: float(table[inside, choice[inside]].sum()) for name, table in tables.items()}
        caps = caps | {name: 0.5 * spent[name] for name in missed}
    best = min(rounds, key=lambda entry: (len(entry["missed"]), entry["short"]))
    return _Found(best["caps"], best["missed"], rounds)


def _takes(session: "circuitpress.run.session.Session", dense: Mapping[str, Level], advance: Advance) -> str | None:
    """The smallest of some larger budgets at which a plan keeps everything; None if none of them does."""
    if TimeLimit.parse(session.recipe.plan.budget) is not None:
        return None  # more bytes are no more time
    numel = session.prices.linear_numel
    bits = 8 * Budget.parse(session.recipe.plan.budget).linear_bytes(numel, session.anatomy.other_bytes) / numel
    larger = (f"{bits * factor:.2f}bpw" for factor in LARGER)
    return next((budget for budget in larger if not _search(session, dense, budget, advance).missed), None)


def _problem(session: "circuitpress.run.session.Session", caps: Mapping[str, float], budget: str | None) -> Problem:
    prices = block_prices(session)
    return pose_problem(prices, session, session.outer, constraints=_caps(session, caps), budget=budget)


def _caps(session: "circuitpress.run.session.Session", found: Mapping[str, float]) -> list[Constraint]:
    prices, kept = block_prices(session), {entry.name: entry for entry in session.kept}
    return [
        cap(prices, name, _table(session, kept[name]), limit, reason=f"behavior {name} loses at most {limit:.3g} nats")
        for name, limit in found.items()
    ]


def _table(session: "circuitpress.run.session.Session", kept: Kept) -> NDArray[np.float64]:
    """The prices of a behavior on the groups and formats that the plan chooses from."""
    return on_offer(Prices.load(kept.folder(session.path) / "prices.safetensors"), session).nats.clip(min=0)


def _measure(
    session: "circuitpress.run.session.Session", problem: Problem, choice: NDArray[np.int64]
) -> dict[str, Level]:
    """The watched half of every behavior under a plan, rounded as `apply` would."""
    from ..probe import outer_edits, plan_edits
    from ..rounding import context
    from ..score.metrics import as_decision, metric_values, rows_of
    from ..score.variants import carry

    calibration, saliency, stream = session.windows[0].ids, session.path / "pricing", session.stream
    plans = {"plan": problem.decide(choice)}
    edits = plan_edits(
        stream, plans, calibration=calibration, saliency=saliency, orders=problem.prices.neuron_order,
        polish=session.recipe.quantize.polish,
    )  # fmt: skip
    outer = outer_edits(stream, plans, saliency=saliency)
    result = {}
    for kept in session.kept:
        both = as_decision(kept.watched)
        final = carry(stream, rows_of(both), edits, outer=outer, context=context(calibration, saliency))["plan"]
        with outer.get("plan", nullcontext)():
            margins = metric_values(stream, both, final)
        result[kept.name] = _level(margins)
    return result
