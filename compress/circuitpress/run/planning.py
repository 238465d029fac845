"""From prices to a plan: protected units are cut out, the solver spends the budget, probes correct its prediction.

No torch unless units are protected inside whole matrices, so that planning again takes a second.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InfeasibleBudget, RecipeError
from ..files import write_bytes_atomic
from ..menu import TARGET_FORMATS
from ..plan import Constraint, Curve, Problem, make_plan, pareto, pose, solve, thin, write_plan
from ..plan.constraints import rules
from ..plan.latency import LatencyTable
from ..plan.outside import AUTO
from ..plan.targets import fit, target_rules
from ..recipe import Recipe
from ..units import Decision, Group, Plan, Prices, UnitId
from ..widths import full_widths, narrow
from .folder import clear

if TYPE_CHECKING:
    import circuitpress.run.session

FRONT = 400
"""Points of the front that are kept: finer than a plot can show, and not 10 000 with unit-wise prices."""

LATER = ("swap", "keep", "apply", "refine", "evaluate", "tasks", "report")
"""Stages whose results hold for one plan only."""
MADE_FROM_PLAN = ("behaviors.json", "swaps.json", "shards", "model", "refine.json", "evaluate", "report.html")
MADE_FROM_PLAN += ("audit.json", "audit.html")
"""What those stages write, and an audit of the model that was."""


def plan_and_front(session: "circuitpress.run.session.Session") -> tuple[Plan, list[dict[str, Any]]]:
    """The plan that the session's recipe asks for, and the Pareto front as rows of pareto.json.

    Raises InfeasibleBudget, and RecipeError for a protected unit that does not exist.
    """
    recipe = session.recipe.plan
    prices = block_prices(session)
    curve = correction(session)
    problem = pose_problem(prices, session, session.outer)
    plan = with_drops(write_plan(problem, solve(problem.prices, problem.constraints), curve=curve), session)
    masks = rules(prices, protect_patterns=session.protect, floors=recipe.floors) + target_rules(prices, recipe.target)
    front = thin(pareto(prices, curve=curve, constraints=masks), most=FRONT)
    return plan, [point.to_json() for point in front]


def with_drops(plan: Plan, session: "circuitpress.run.session.Session") -> Plan:
    """`plan` with the KL that pruning cost, as measured on held-out text, in its predictions: prices know only bits."""
    if (pruned := session.pruned) is None:
        return plan
    kl, corrected = pruned["kl"], plan.predicted_kl_corrected
    return replace(
        plan,
        predicted_kl=plan.predicted_kl + kl,
        predicted_kl_corrected=None if corrected is None else corrected + kl,
        bound_kl=plan.bound_kl + kl,
        provenance=plan.provenance | {"pruned": pruned["widths"] | {"kl": kl}},
    )


def refuse_impossible(session: "circuitpress.run.session.Session") -> None:
    """Raises what `plan_and_front` would raise after hours of scoring, from shapes alone: bytes need no weights.

    A stand-in price that falls with bytes makes the widest format the best one, as it is in every real table.
    """
    from ..formats import parse
    from ..outer import outer_bytes, outer_groups
    from ..segments import groups_of

    anatomy, widths = session.original_anatomy, session.least_widths
    if widths != full_widths(anatomy):
        if session.recipe.plan.protect:  # names of units would be those of the model that is not there yet
            return
        anatomy = narrow(anatomy, widths)
    formats = session.names(session.recipe.plan.formats)
    granularity = session.recipe.plan.granularity
    groups = tuple(group for block in anatomy.blocks for group in groups_of(block, granularity))
    sizes = [[sum(parse(f).nbytes(s.rows, s.cols) for s in group.segments) for f in formats] for group in groups]
    nbytes = np.array(sizes, dtype=np.int64)
    prices = replace(_stand_in(groups, formats, nbytes), original_numel=anatomy.original_numel)
    menu = session.outer_menu()
    outer = _stand_in(outer_groups(session.anatomy), menu, outer_bytes(outer_groups(session.anatomy), menu))
    problem = pose_problem(_shaped(prices, session), session, outer)
    solve(problem.prices, problem.constraints)


def _stand_in(groups: Sequence[Group], formats: Sequence[str], nbytes: NDArray[np.int64]) -> Prices:
    return Prices(tuple(groups), tuple(formats), nbytes, 1 / nbytes, 1 / nbytes, 1 / nbytes)


def block_prices(session: "circuitpress.run.session.Session") -> Prices:
    """The prices of decoder blocks as the plan needs them."""
    return on_offer(session.prices, session)


def on_offer(prices: Prices, session: "circuitpress.run.session.Session") -> Prices:
    """A table of prices with the formats on offer alone, protected units cut out, and the groups of the target."""
    return _shaped(_on_offer(prices), session)


def correction(session: "circuitpress.run.session.Session") -> Curve | None:
    """The curve through the session's probes; None without any."""
    return Curve.fit(session.probes) if session.probes else None


def pose_problem(
    prices: Prices, session: "circuitpress.run.session.Session", outer: Prices | None, *,
    constraints: Sequence[Constraint] = (), budget: str | None = None,
) -> Problem:  # fmt: skip
    """What the recipe asks of the planner, for the tables of blocks and of embedding and lm_head.

    `constraints` are further rules on `prices`; `budget` takes the place of the recipe's.
    """
    recipe, anatomy = session.recipe.plan, session.anatomy
    fixed = recipe.outer if recipe.outer == AUTO else session.names([recipe.outer])[0]
    return pose(
        prices,
        budget=budget or recipe.budget,
        target=recipe.target,
        protect=session.protect,
        floors=recipe.floors,
        other_bytes=anatomy.other_bytes + anatomy.header_bytes - (anatomy.outer_bytes if outer else 0),
        constraints=constraints,
        outer=outer,
        outer_format=fixed,
        latencies=LatencyTable.load(recipe.latencies) if recipe.latencies else None,
    )


def front_plans(session: "circuitpress.run.session.Session") -> dict[str, tuple[Decision, ...]]:
    """The best plans of the sizes among the recipe's probes, by label.

    A size below the smallest plan is left out, and so is one that no more bytes can improve on.
    """
    prices, result = _on_offer(session.prices), {}
    for size in session.recipe.plan.probes:
        if not size.endswith("bpw"):
            continue
        with contextlib.suppress(InfeasibleBudget):
            decisions = make_plan(prices, budget=size, other_bytes=0).decisions
            if decisions not in result.values():
                result[f"plan {size}"] = decisions
    return result


def plan_again(session: "circuitpress.run.session.Session", recipe: Recipe) -> None:
    """Plans with `recipe` and saves; a plan other than the present one discards the model that was made from that.

    Nothing is touched if there is no feasible plan. The journal forgets first: a crash in between repeats work only.
    """
    from .fingerprint import settings

    before, session.recipe = session.recipe, recipe
    try:
        plan, front = plan_and_front(session)
    except Exception:
        session.recipe = before
        raise
    folder = session.folder
    if not _is_present(session.path, plan):
        folder.forget("plan", *LATER)
        clear(session.path, MADE_FROM_PLAN)
        plan.save(session.path / "plan.json")
    session.write("pareto.json", front)
    write_bytes_atomic(session.path / "recipe.yaml", recipe.to_yaml().encode())
    folder.fingerprints |= settings(recipe)
    folder.save()


def digest_plan(plan: Plan) -> str:
    """A digest of everything in a plan."""
    return hashlib.sha256(json.dumps(plan.to_json(), sort_keys=True).encode()).hexdigest()


def _is_present(path: Path, plan: Plan) -> bool:
    """Whether the run folder at `path` holds `plan`, or what measured swaps made of it."""
    if not (path / "plan.json").exists():
        return False
    if Plan.load(path / "plan.json").to_json() == plan.to_json():
        return True
    swaps = path / "swaps.json"
    return swaps.exists() and json.loads(swaps.read_text())["plan"] == digest_plan(plan)


def _on_offer(prices: Prices) -> Prices:
    """Only the formats of the recipe: probes may have needed the prices of others."""
    offered = prices.provenance.get("offered", prices.formats)
    columns = [k for k, name in enumerate(prices.formats) if name in offered]
    cut = {name: getattr(prices, name)[:, columns] for name in ("nbytes", "nats", "nats_sequence", "stderr")}
    return replace(prices, formats=tuple(prices.formats[k] for k in columns), **cut)


def _shaped(prices: Prices, session: "circuitpress.run.session.Session") -> Prices:
    return fit(_cut_out(prices, session), session.recipe.plan.target)


def _cut_out(prices: Prices, session: "circuitpress.run.session.Session") -> Prices:
    """With whole matrices as groups, the rows and columns of protected units become groups of their own.

    A target that has one format a matrix keeps them whole: all of a protected unit's matrices are then protected.
    """
    if session.recipe.plan.granularity != "matrix":
        return prices
    units: list[UnitId] = []
    for pattern in session.protect:
        with contextlib.suppress(ValueError):  # a layer, a module or a pattern
            units.append(UnitId.parse(pattern))
        if re.search(r"[*?\[]", pattern) and re.search(r"\.(head|kv_group|neuron)\.", pattern):
            units += [unit for unit in session.anatomy.units() if fnmatchcase(str(unit), pattern)]
    if not units:
        return prices
    from ..segments import name_units, split_protected

    separate = name_units if session.recipe.plan.target in TARGET_FORMATS else split_protected
    try:
        return separate(prices, list(dict.fromkeys(units)), session.anatomy)
    except ValueError as error:
        raise RecipeError([f"plan.protect: {error}"], hint="circuitpress check MODEL lists the units") from error


def load_plan(path: Path) -> Plan:
    """The plan in a plan.json, or in the run folder at `path`; RecipeError says what is there instead."""
    file = path / "plan.json" if path.is_dir() else path
    try:
        return Plan.load(file)
    except OSError as error:
        hint = f"circuitpress plan {path} --budget 3.0bpw" if path.is_dir() else "pass a plan.json or a run folder"
        raise RecipeError([f"cannot read the plan {file}: {error.strerror}"], hint=hint) from error
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError([f"{file} is not a plan of circuitpress: {error!r}"], hint="pass a plan.json") from error
