"""Named behaviors that a run keeps: priced, leaned to, capped in the plan, and measured on the compressed model.

1. The pairs of a behavior are split in two, by a seeded permutation. One half is priced and watched while planning
   (and refinement learns from it), the other one judges the finished model.
2. `price_behaviors`: KL at the positions where the behavior is decided, as the Fisher price of every group in every
   format; and the Hessian of its prompts, which joins that of the text in all rounding (hessians.py).
3. `keep`, once swaps have chosen the plan: it is measured as a variant of one walk (watching.py). For a behavior below
   its floor, rounding leans towards it (leaning.py), at no bytes.
4. Where that is not enough, the sum of its prices gets a linear cap, half of what the present plan spends on it (three
   quarters if no plan can do that, and so on), and the planner solves again within the same bytes.
5. `judge`: dense and compressed model on the other half; the floor is `keep` times what the dense model does.

Where nothing in the budget keeps everything, larger ones are measured, so that the error can say what it would take.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..console import Advance
from ..errors import InfeasibleBudget, RecipeError
from ..plan import Constraint, Problem, TimeLimit, cap, solve, write_plan
from ..plan.budget import Budget
from ..units import Plan, Prices
from .hessians import DRAWS, prompts
from .leaning import ROUNDS as LEANS
from .leaning import Measured, find_lean
from .planning import block_prices, correction, on_offer, pose_problem, with_drops
from .watching import Watch, leans_of

if TYPE_CHECKING:
    import circuitpress.behaviors
    import circuitpress.lean
    import circuitpress.run.session
    import circuitpress.stream

log = logging.getLogger(__name__)

ROUNDS = 8
"""How often caps are tightened, or loosened again where no plan meets them."""
LARGER = (1.1, 1.25, 1.5, 2.0)
"""Budgets, against the one asked for, that are tried to say what keeping a behavior would take."""
PRICED = 128
"""Pairs that are priced at most."""


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


def leans(session: "circuitpress.run.session.Session") -> "list[circuitpress.lean.Lean]":
    """What the keep stage found that rounding should lean to."""
    found = lambdas(session)
    return leans_of(session.path, session.kept, [found.get(kept.name, 0.0) for kept in session.kept])


def lambdas(session: "circuitpress.run.session.Session") -> dict[str, float]:
    """Nats per unit of margin that the keep stage found for each behavior; empty before it."""
    path = session.path / "behaviors.json"
    return json.loads(path.read_text())["leans"] if path.exists() else {}


def keep(session: "circuitpress.run.session.Session") -> None:
    """Finds the lean and the caps with which the plan keeps all behaviors; writes behaviors.json, then plan.json anew
    where there are caps.

    The search starts from plan.json, so a behaviors.json that a killed run has left is not searched for again.
    """
    path = session.path / "behaviors.json"
    if not path.exists():
        session.write("behaviors.json", _searched(session))
    if caps := json.loads(path.read_text())["caps"]:
        problem = _problem(session, caps, None)
        plan = write_plan(problem, solve(problem.prices, problem.constraints), curve=correction(session))
        with_drops(plan, session).save(session.path / "plan.json")


def _searched(session: "circuitpress.run.session.Session") -> dict[str, Any]:
    """What behaviors.json holds."""
    document: dict[str, Any] = {"caps": {}, "leans": {}, "missed": [], "rounds": [], "takes": None}
    if session.kept:
        watch = Watch(session)
        with session.console.progress("keep", 1 + LEANS + ROUNDS) as advance:
            found = _search(session, watch, None, advance)
            document |= asdict(found) | {"dense": watch.floors.dense.tolist()}
            if found.missed:
                document["takes"] = _takes(session, watch, advance)
    return document


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


@dataclass(frozen=True)
class _Found:
    """Caps in nats and lambda of the lean by behavior, what their plan still misses, and what was measured on the way.

    Of plans that all miss something, it is the one that misses fewest behaviors, then the one that comes nearest.
    """

    caps: dict[str, float]
    leans: dict[str, float]
    missed: list[str]
    rounds: list[dict[str, Any]]
    kl: tuple[float, float]
    """Of the plan on held-out text, without the lean and with it; before caps."""


def _search(session: "circuitpress.run.session.Session", watch: Watch, budget: str | None, advance: Advance) -> _Found:
    floors, names = watch.floors, [kept.name for kept in session.kept]
    problem = _problem(session, {}, budget)
    decisions = problem.decide(solve(problem.prices, problem.constraints).choice)
    if budget is None:
        # What swaps have made of it.
        plan = Plan.load(session.path / "plan.json")
        decisions = (*plan.decisions, *plan.outer)

    def measure(nats: NDArray[np.float64]) -> Measured:
        found = watch.measure(decisions, nats)
        advance(1, f"{int((floors.short(found) > 0).sum())} of {len(names)} behaviors below their floors")
        return found

    found = find_lean(measure, floors, watch.respond if watch.may_lean else None)
    nats = dict(zip(names, found.nats.tolist(), strict=True))
    rounds: list[dict[str, Any]] = []

    def enter(caps: dict[str, float], measured: Measured) -> list[str]:
        short = floors.short(measured)
        missed = [name for name, share in zip(names, short, strict=True) if share > 0]
        rounds.append(
            {"caps": caps, "measured": measured.to_json(names), "missed": missed, "short": float(short.sum())}
        )
        return missed

    caps: dict[str, float] = {}
    missed = enter(caps, found.measured)
    tables = {kept.name: _table(session, kept) for kept in session.kept}
    spent: dict[str, float] = {}
    for _ in range(ROUNDS + 1 if missed else 0):
        try:
            choice = solve(problem.prices, problem.constraints).choice
        except InfeasibleBudget:
            # Half-way back to the last plan that there was.
            caps = {name: 0.5 * (limit + max(limit, spent[name])) for name, limit in caps.items()}
            problem = _problem(session, caps, budget)
            continue
        if caps:
            measured = watch.measure(problem.decide(choice), found.nats)
            missed = enter(caps, measured)
            advance(1, f"{len(missed)} of {len(names)} behaviors below their floors")
            if not missed:
                break
        inside = np.arange(len(next(iter(tables.values()))))
        spent = {name: float(table[inside, choice[inside]].sum()) for name, table in tables.items()}
        caps = caps | {name: 0.5 * spent[name] for name in missed}
        problem = _problem(session, caps, budget)
    best = min(rounds, key=lambda entry: (len(entry["missed"]), entry["short"]))
    return _Found(
        best["caps"], nats, best["missed"], [*found.rounds, *rounds], (found.rounds[0]["kl"], found.measured.kl)
    )


def _takes(session: "circuitpress.run.session.Session", watch: Watch, advance: Advance) -> str | None:
    """The smallest of some larger budgets at which a plan keeps everything; None if none of them does."""
    if TimeLimit.parse(session.recipe.plan.budget) is not None:
        return None  # more bytes are no more time
    numel = session.prices.linear_numel
    bits = 8 * Budget.parse(session.recipe.plan.budget).linear_bytes(numel, session.anatomy.other_bytes) / numel
    larger = (f"{bits * factor:.2f}bpw" for factor in LARGER)
    return next((budget for budget in larger if not _search(session, watch, budget, advance).missed), None)


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
