"""The model card: what was done to which model, what it costs by measurement, and how to load it.

Everything in it is read from the run folder around the model; nothing is claimed that no file says. Local paths stay at
home: files appear by their names.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..errors import CircuitpressError
from ..report.read import RunFiles, read_run
from .licence import Terms

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Evidence:
    """A model folder and what is known about it; `run` is None for a folder outside a run."""

    model: Path
    config: Json
    run: RunFiles | None
    tasks: Json = field(default_factory=dict)
    behaviors: tuple[Json, ...] = ()
    prune: Json = field(default_factory=dict)


def gather(folder: Path) -> Evidence:
    """Reads a model folder, or a run folder with a model in it, and the run's measurements.

    Raises CircuitpressError for a folder without a model.
    """
    model = folder / "model" if (folder / "model" / "config.json").is_file() else folder
    if not (model / "config.json").is_file():
        raise CircuitpressError(
            f"{folder} holds no model: there is no config.json",
            hint="pass the model folder of a run, such as runs/mine/model, or what `circuitpress export` wrote",
        )
    run = model.resolve().parent
    inside = model.name == "model" and (run / "plan.json").is_file() and (run / "anatomy.json").is_file()
    return Evidence(
        model=model.resolve(),
        config=_read(model / "config.json"),
        run=read_run(run) if inside else None,
        tasks=_read(run / "evaluate" / "tasks.json") if inside else {},
        behaviors=tuple(_read(run / "evaluate" / "behaviors.json") or ()) if inside else (),
        prune=_read(run / "prune.json") if inside else {},
    )


def model_card(evidence: Evidence, repo: str, *, base: str | None, terms: Terms) -> str:
    """README.md of the repository `repo`, front matter included; `base` is the Hub id of the original."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False)
    template = resources.files(__name__.rpartition(".")[0]).joinpath("card.md.j2").read_text(encoding="utf-8")
    run = evidence.run
    rows = [row for row in evidence.tasks.get("rows", []) if row["asked"]]
    return environment.from_string(template).render(
        front=_front_matter(evidence, base, terms),
        name=repo.partition("/")[2] or repo,
        repo=repo,
        base=base,
        method=(evidence.config.get("quantization_config") or {}).get("quant_method"),
        terms=terms,
        version=__version__,
        versions=run.manifest.get("versions", {}) if run else {},
        plan=_plan(run) if run else None,
        fidelity=run.fidelity if run else None,
        anatomy=run.anatomy if run else None,
        recipe=public_recipe(run, base) if run else None,
        behaviors=evidence.behaviors,
        widths=evidence.prune.get("widths"),
        tasks=rows,
        about={"lm_eval": "", "chat_template": None, "prepends_bos": False} | evidence.tasks.get("provenance", {}),
        settings={"limit": None} | evidence.tasks.get("settings", {}),
        recovery=evidence.tasks.get("recovery"),
        lost=[behavior["name"] for behavior in evidence.behaviors if not behavior["kept"]],
    )


def public_recipe(run: RunFiles, base: str | None) -> str:
    """The run's recipe without the paths of the machine: files by their names, the model by its Hub id."""
    recipe = scrubbed(run.recipe)
    recipe["model"] = base or recipe.get("model")
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)


def scrubbed(document: Any) -> Any:
    """A copy of a JSON document in which absolute paths are only file names."""
    if isinstance(document, dict):
        return {key: scrubbed(value) for key, value in document.items()}
    if isinstance(document, list):
        return [scrubbed(value) for value in document]
    if isinstance(document, str) and re.match(r"(/|~/|[A-Za-z]:\\)[^\n]*$", document):
        return re.split(r"[/\\]", document.rstrip("/\\"))[-1]
    return document


def hub_base(evidence: Evidence) -> str | None:
    """The Hub id of the original, where the recipe names one; its revision is left out."""
    model = str(evidence.run.recipe.get("model", "")) if evidence.run else ""
    is_id = model.count("/") == 1 and not model.startswith((".", "/", "~")) and not Path(model).exists()
    return model.partition("@")[0] if is_id else None


def _front_matter(evidence: Evidence, base: str | None, terms: Terms) -> str:
    data: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if terms.licence:
        data["license"] = terms.licence
    if base:
        data |= {"base_model": base, "base_model_relation": "quantized"}
    tags = ["circuitpress", "compressed", "mixed-precision"]
    data["tags"] = [*tags, "pruned"] if evidence.prune.get("widths") else tags
    if evidence.run and evidence.run.recipe.get("evaluate", {}).get("tasks"):
        data["metrics"] = sorted({row["metric"] for row in evidence.tasks.get("rows", []) if row["asked"]})
    return yaml.safe_dump(data, sort_keys=False).strip()


def _plan(run: RunFiles) -> dict[str, Any]:
    numel: dict[str, int] = {}
    for decision in run.plan.decisions:
        numel[decision.format] = numel.get(decision.format, 0) + decision.group.numel
    shares = [(name, n / run.plan.linear_numel) for name, n in sorted(numel.items(), key=lambda entry: -entry[1]) if n]
    return {
        "budget": run.plan.budget,
        "bits": run.plan.bits_per_weight,
        "linear_bytes": run.plan.linear_bytes,
        "predicted": run.plan.predicted_kl,
        "corrected": run.plan.predicted_kl_corrected,
        "shares": shares,
        "protected": sorted({d.group.name for d in run.plan.decisions if d.protected}),
    }


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise CircuitpressError(f"{path} is damaged: {error}", hint="make it again, or remove it") from error
