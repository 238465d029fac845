"""Everything that the report shows, read from a run folder. What a run has not produced yet is None, not an error."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import CircuitpressError
from ..plan import Point, pareto
from ..units import Plan, Prices, Probe, Scores

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Exact:
    """The causal check of prices: rows of group, format, price and measured KL, and how well they agree."""

    rows: tuple[Json, ...]
    spearman: float | None
    median_ratio: float | None


@dataclass(frozen=True)
class RunFiles:
    """The content of a run folder; `roles` maps a module to (layer, role), `role_names` are in the order of a block.

    `front` is pareto.json, or computed from the prices. `fidelity` is evaluate/fidelity.json as it stands.
    """

    folder: Path
    plan: Plan
    prices: Prices
    roles: Mapping[str, tuple[int, str]]
    role_names: tuple[str, ...]
    anatomy: Json
    recipe_text: str
    recipe: Json
    manifest: Json
    scores: Scores | None
    probes: tuple[Probe, ...]
    front: tuple[Point, ...]
    exact: Exact | None
    fidelity: Json | None
    tasks: Json
    """evaluate/tasks.json; {} where no tasks were asked for."""
    behaviors: tuple[Json, ...]
    """evaluate/behaviors.json: what is left of the behaviors that the recipe names."""
    leaning: tuple[float, float] | None
    """KL on held-out text without and with the lean of rounding towards them; None if it does not lean."""
    audit: Json | None
    """audit.json, if `circuitpress audit` wrote it there for this model."""


def read_run(folder: Path) -> RunFiles:
    """Reads a run folder; CircuitpressError names the file that a report cannot do without."""
    for name, stage in (("anatomy.json", "score"), ("prices.safetensors", "score"), ("plan.json", "plan")):
        if not (folder / name).is_file():
            ways = {"score": f"circuitpress score MODEL --out {folder}", "plan": f"circuitpress plan {folder}"}
            raise CircuitpressError(f"{folder} has no {name}: there is nothing to report yet", hint=ways[stage])
    anatomy = _json(folder / "anatomy.json") or {}
    prices = Prices.load(folder / "prices.safetensors")
    recipe = folder / "recipe.yaml"
    recipe_text = recipe.read_text(encoding="utf-8") if recipe.is_file() else ""
    front = _json(folder / "pareto.json")
    exact = _json(folder / "exact.json")
    fidelity = _json(folder / "evaluate" / "fidelity.json")
    blocks = anatomy["blocks"]
    return RunFiles(
        folder=folder,
        plan=Plan.load(folder / "plan.json"),
        prices=prices,
        roles={matrix["module"]: (block["index"], matrix["role"]) for block in blocks for matrix in block["matrices"]},
        role_names=tuple(dict.fromkeys(matrix["role"] for block in blocks for matrix in block["matrices"])),
        anatomy=anatomy,
        recipe_text=recipe_text,
        recipe=yaml.safe_load(recipe_text) or {},
        manifest=_json(folder / "manifest.json") or {},
        scores=_scores(folder / "scores.safetensors"),
        probes=tuple(Probe(**entry) for entry in _json(folder / "probes.json") or ()),
        front=tuple(pareto(prices) if front is None else (Point(**entry) for entry in front)),
        exact=None if exact is None else Exact(tuple(exact["rows"]), exact.get("spearman"), exact.get("median_ratio")),
        fidelity=fidelity,
        tasks=_json(folder / "evaluate" / "tasks.json") or {},
        behaviors=tuple(_json(folder / "evaluate" / "behaviors.json") or ()),
        leaning=_leaning(folder),
        audit=_audit(folder, fidelity),
    )


def _leaning(folder: Path) -> tuple[float, float] | None:
    document = _json(folder / "behaviors.json") or {}
    return tuple(document["kl"]) if any(document.get("leans", {}).values()) else None


def _audit(folder: Path, fidelity: Json | None) -> Json | None:
    """audit.json, unless it is of another model than was measured here: then its files have another size."""
    document = _json(folder / "audit.json")
    same = document and (fidelity is None or document["fidelity"].get("bytes") == fidelity["bytes"])
    return document if same else None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise CircuitpressError(
            f"{path} is damaged: {error}", hint="remove it and run the same command again"
        ) from error


def _scores(path: Path) -> Scores | None:
    return Scores.load(path) if path.is_file() else None
