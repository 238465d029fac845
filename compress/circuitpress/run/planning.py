"""From prices to a plan: protected units are cut out, the solver spends the budget, probes correct its prediction.

No torch unless units are protected inside whole matrices, so that planning again takes a second.
"""

import contextlib
import re
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RecipeError
from ..files import write_bytes_atomic
from ..plan import Curve, make_plan, pareto, thin
from ..plan.constraints import rules
from ..recipe import Recipe
from ..units import Plan, Prices, UnitId
from .folder import clear

if TYPE_CHECKING:
    import circuitpress.run.session

FRONT = 400
"""Points of the front that are kept: finer than a plot can show, and not 10 000 with unit-wise prices."""

LATER = ("apply", "evaluate", "report")
"""Stages whose results hold for one plan only."""


def plan_and_front(session: "circuitpress.run.session.Session") -> tuple[Plan, list[dict[str, Any]]]:
    """The plan that the session's recipe asks for, and the Pareto front as rows of pareto.json.

    Raises InfeasibleBudget, and RecipeError for a protected unit that does not exist.
    """
    recipe = session.recipe.plan
    prices = _cut_out(_on_offer(session.prices), session)
    curve = Curve.fit(session.probes) if session.probes else None
    plan = _solve(prices, session, curve)
    masks = rules(prices, protect_patterns=recipe.protect, floors=recipe.floors)
    front = thin(pareto(prices, curve=curve, constraints=masks), most=FRONT)
    return plan, [point.to_json() for point in front]


def refuse_impossible(session: "circuitpress.run.session.Session") -> None:
    """Raises what `plan_and_front` would raise after hours of scoring, from shapes alone: bytes need no weights.

    A stand-in price that falls with bytes makes the widest format the best one, as it is in every real table.
    """
    from ..formats import parse
    from ..segments import groups_of

    formats = session.names(session.recipe.plan.formats)
    granularity = session.recipe.plan.granularity
    groups = tuple(group for block in session.anatomy.blocks for group in groups_of(block, granularity))
    sizes = [[sum(parse(f).nbytes(s.rows, s.cols) for s in group.segments) for f in formats] for group in groups]
    nbytes = np.array(sizes, dtype=np.int64)
    prices = Prices(groups, tuple(formats), nbytes, 1 / nbytes, 1 / nbytes, 1 / nbytes)
    _solve(_cut_out(prices, session), session, None)


def _solve(prices: Prices, session: "circuitpress.run.session.Session", curve: Curve | None) -> Plan:
    recipe = session.recipe.plan
    return make_plan(
        prices,
        budget=recipe.budget,
        target=recipe.target,
        protect=recipe.protect,
        floors=recipe.floors,
        other_bytes=session.anatomy.other_bytes + session.anatomy.header_bytes,
        curve=curve,
    )


def plan_again(session: "circuitpress.run.session.Session", recipe: Recipe) -> None:
    """Plans with `recipe` and saves; a plan other than the present one discards the model that was made from that.

    Nothing is touched if there is no feasible plan. The journal forgets first: a crash in between repeats work only.
    """
    before, session.recipe = session.recipe, recipe
    try:
        plan, front = plan_and_front(session)
    except Exception:
        session.recipe = before
        raise
    path, folder = session.path / "plan.json", session.folder
    if not path.exists() or Plan.load(path).to_json() != plan.to_json():
        folder.forget("plan", *LATER)
        clear(session.path, ("shards", "model", "evaluate", "report.html"))
    plan.save(path)
    session.write("pareto.json", front)
    write_bytes_atomic(session.path / "recipe.yaml", recipe.to_yaml().encode())
    folder.fingerprints |= {f"recipe.{key}": value for key, value in recipe.flatten().items()}
    folder.save()


def _on_offer(prices: Prices) -> Prices:
    """Only the formats of the recipe: probes may have needed the prices of others."""
    offered = prices.provenance.get("offered", prices.formats)
    columns = [k for k, name in enumerate(prices.formats) if name in offered]
    cut = {name: getattr(prices, name)[:, columns] for name in ("nbytes", "nats", "nats_sequence", "stderr")}
    return replace(prices, formats=tuple(prices.formats[k] for k in columns), **cut)


def _cut_out(prices: Prices, session: "circuitpress.run.session.Session") -> Prices:
    """With whole matrices as groups, the rows and columns of protected units become groups of their own."""
    if session.recipe.plan.granularity != "matrix":
        return prices
    units: list[UnitId] = []
    for pattern in session.recipe.plan.protect:
        with contextlib.suppress(ValueError):  # a layer, a module or a pattern
            units.append(UnitId.parse(pattern))
        if re.search(r"[*?\[]", pattern) and re.search(r"\.(head|kv_group|neuron)\.", pattern):
            units += [unit for unit in session.anatomy.units() if fnmatchcase(str(unit), pattern)]
    if not units:
        return prices
    from ..segments import split_protected

    try:
        return split_protected(prices, list(dict.fromkeys(units)), session.anatomy)
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
