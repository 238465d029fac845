"""The stages of a run, in order; each reads what earlier ones wrote and writes its own files into the run folder.

    check -> prune -> score -> exact -> probe -> plan -> swap -> keep -> apply -> refine -> evaluate -> tasks -> report

| stage | writes | what it does |
|---|---|---|
| check | anatomy.json | places every matrix; reads the text and headers, no weights |
| prune | prune.json, pruned/ | removes neurons and KV groups, if the recipe asks; the next stages work on the rest |
| score | scores, prices, outer, pricing/ | Fisher scores and the price of every group in every format |
| exact | exact.json | changes single groups and measures, to say how far prices can be trusted |
| probe | probes.json | measures other plans, to correct the additive prediction |
| plan | plan.json, pareto.json | spends the budget |
| swap | swaps.json, plan.json | measures plans around it and takes better ones |
| keep | behaviors.json, plan.json | makes rounding lean, then plans again, until named behaviors are kept, if any |
| apply | shards/, model/ | rounds, packs, writes the model |
| refine | refine.json, model/ | learns codes, scales and norms together, if the recipe asks for steps |
| evaluate | evaluate/fidelity.json | KL, top-1 and perplexity against the original, on text that nothing else saw |
| tasks | evaluate/tasks.json | original and result on lm-eval tasks, if the recipe names any |
| report | report.html | one page for people |

Everything heavy (windows, the stream) is made when a stage first asks for it, so a rerun that finds all stages finished
loads no weights.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import QualityGateMissed
from ..recipe import Recipe
from ..units import Plan, Probe
from .folder import full_disk_is_an_error
from .hessians import beside
from .keeping import judge, keep, leans, price_behaviors
from .planning import front_plans, plan_again
from .pruning import prune_model
from .session import Session
from .swapping import swap
from .tasks import asked_by, compare_on_tasks, refuse_tasks

log = logging.getLogger(__name__)

EXACT_WINDOWS = 16
"""Windows for single changes: there are many of them, and their rank needs less precision than the probes' KL."""


@dataclass(frozen=True)
class Stage:
    """One step: its name, what it does, and the files that must exist for it to count as finished."""

    name: str
    work: Callable[[Session], None]
    files: tuple[str, ...]


def execute(session: Session, names: Sequence[str]) -> None:
    """Runs those of the stages `names` that are not finished, in order, and enters each in the journal."""
    for stage in STAGES:
        if stage.name not in names:
            continue
        if session.folder.is_finished(stage.name, stage.files):
            session.console.say(f"{stage.name:<9} done before")
            continue
        started = time.monotonic()
        with full_disk_is_an_error(session.path):
            stage.work(session)
            session.folder.finish(stage.name, time.monotonic() - started)


def _check(session: Session) -> None:
    # A text, behavior or task that cannot be read says so here, before anything is computed.
    refuse_tasks(session.recipe, session.checkpoint)
    log.info("%d windows of text, %d behaviors", sum(len(w.ids) for w in session.windows), len(session.kept))
    session.write("anatomy.json", session.original_anatomy.to_json())


def _prune(session: Session) -> None:
    prune_model(session, _score, _apply)


def _score(session: Session) -> None:
    from ..outer import load_outer
    from ..plan.targets import rounded_here
    from ..price import price

    recipe, (calibration, held_out, test) = session.recipe, session.windows
    formats = session.names([*recipe.plan.formats, *_uniform(recipe)])
    others = beside(session)
    with session.console.progress("score", session.anatomy.work) as advance:
        scores, prices = price(
            session.scoring, calibration.ids, formats=formats, granularity=recipe.plan.granularity,
            draws=recipe.score.draws, seed=recipe.data.seed, folder=session.path / "pricing",
            outer=session.outer_menu(), beside=others, feedback=rounded_here(recipe.plan.target),
            advance=advance,
        )  # fmt: skip
    provenance = {
        "model": recipe.model,
        "calibration": calibration.describe(),
        "held_out": held_out.describe(),
        "test": test.describe(),
        "granularity": recipe.plan.granularity,
        "offered": session.names(recipe.plan.formats),
        "draws": recipe.score.draws,
    }
    if outer := load_outer(session.anatomy, session.path / "pricing"):
        outer.save(session.path / "outer.safetensors")
    replace(scores, provenance=scores.provenance | provenance).save(session.path / "scores.safetensors")
    replace(prices, provenance=prices.provenance | provenance).save(session.path / "prices.safetensors")
    price_behaviors(session, formats)


def _exact(session: Session) -> None:
    from ..probe import choose_singles, exact

    recipe, (calibration, held_out, _) = session.recipe, session.windows
    formats = session.names(_uniform(recipe) or recipe.plan.formats)
    singles = choose_singles(session.prices, formats, recipe.score.exact, seed=recipe.data.seed)
    document: dict[str, Any] = {"rows": [], "spearman": None, "median_ratio": None}
    if singles:
        with session.console.progress("exact", session.anatomy.work) as advance:
            document = exact(
                session.stream, calibration=calibration.ids, held_out=held_out.ids[:EXACT_WINDOWS],
                prices=session.prices, saliency=session.path / "pricing", singles=singles, advance=advance,
            )  # fmt: skip
    session.write("exact.json", document)


def _probe(session: Session) -> None:
    from ..probe import probe

    calibration, held_out, _ = session.windows
    formats, plans = session.names(_uniform(session.recipe)), front_plans(session)
    probes: list[Probe] = []
    correct = session.recipe.quantize.correct
    if formats or plans:
        with session.console.progress("probe", session.anatomy.work) as advance:
            probes = probe(
                session.stream, calibration=calibration.ids, held_out=held_out.ids, prices=session.prices,
                saliency=session.path / "pricing", formats=formats, plans=plans,
                polish=session.recipe.quantize.polish, correct=correct, beside=beside(session) if correct else (),
                advance=advance,
            )  # fmt: skip
    session.write("probes.json", [asdict(entry) for entry in probes])


def _plan(session: Session) -> None:
    plan_again(session, session.recipe)


def _keep(session: Session) -> None:
    keep(session)


def _swap(session: Session) -> None:
    swap(session)


def _apply(session: Session) -> None:
    from ..apply import apply

    plan = Plan.load(session.path / "plan.json")
    calibration, _, _ = session.windows
    correct = session.recipe.quantize.correct
    with session.console.progress("apply", session.anatomy.work) as advance:
        apply(
            session.stream, plan, calibration.ids, saliency=session.path / "pricing", shards=session.path / "shards",
            out=session.path / "model", polish=session.recipe.quantize.polish,
            correct=correct, beside=beside(session) if correct else (), leans=leans(session), advance=advance,
        )  # fmt: skip


def _refine(session: Session) -> None:
    from .refining import refine_model

    refine_model(session)


def _evaluate(session: Session) -> None:
    from ..evaluate import fidelity

    _, _, test = session.windows
    model = session.open(session.path / "model")
    with session.console.progress("evaluate", (*session.original_anatomy.work, *model.anatomy.work)) as advance:
        result = fidelity(model, session.original, test.ids, advance=advance)
    if session.kept:
        session.write("evaluate/behaviors.json", judge(session))
    session.write("evaluate/fidelity.json", result.to_json() | {"text": test.describe()})


def _tasks(session: Session) -> None:
    document: dict[str, Any] = {"rows": []}
    if session.recipe.evaluate.tasks:
        document = compare_on_tasks(
            session.path / "model", session.checkpoint, asked_by(session.recipe), device=session.device,
            console=session.console,
        )  # fmt: skip
    session.write("evaluate/tasks.json", document)


def _report(session: Session) -> None:
    from ..report import write_report

    write_report(session.path)


STAGES = (
    Stage("check", _check, ("anatomy.json",)),
    Stage("prune", _prune, ("prune.json",)),
    Stage("score", _score, ("scores.safetensors", "prices.safetensors")),
    Stage("exact", _exact, ("exact.json",)),
    Stage("probe", _probe, ("probes.json",)),
    Stage("plan", _plan, ("plan.json", "pareto.json")),
    Stage("swap", _swap, ("swaps.json", "plan.json")),
    Stage("keep", _keep, ("behaviors.json", "plan.json")),
    Stage("apply", _apply, ("model/config.json",)),
    Stage("refine", _refine, ("refine.json",)),
    Stage("evaluate", _evaluate, ("evaluate/fidelity.json",)),
    Stage("tasks", _tasks, ("evaluate/tasks.json",)),
    Stage("report", _report, ("report.html",)),
)
NAMES = tuple(stage.name for stage in STAGES)


def _uniform(recipe: Recipe) -> list[str]:
    """The probes that are formats, and not sizes of plans."""
    return [name for name in recipe.plan.probes if not name.endswith("bpw")]


def check_gates(recipe: Recipe, fidelity: dict[str, Any]) -> None:
    """Raises QualityGateMissed if the measured fidelity is short of what the recipe asks for."""
    missed = []
    gates = recipe.evaluate
    if gates.max_kl is not None and not fidelity["kl"] <= gates.max_kl:
        missed.append(f"KL is {fidelity['kl']:.4g} nats per token, evaluate.max_kl is {gates.max_kl:g}")
    if gates.min_top1 is not None and not fidelity["top1_agreement"] >= gates.min_top1:
        missed.append(f"top-1 agreement is {fidelity['top1_agreement']:.4f}, evaluate.min_top1 is {gates.min_top1:g}")
    if (recovery := fidelity.get("recovery")) is not None and recovery < (gates.min_recovery or 0):
        missed.append(f"{recovery:.4f} of the task scores is left, evaluate.min_recovery is {gates.min_recovery:g}")
    missed += [_lost(row, fidelity["behaviors_take"]) for row in fidelity.get("behaviors", []) if not row["kept"]]
    if missed:
        raise QualityGateMissed("\n".join(missed), hint="the model was written; give a larger budget for a better one")


def _lost(row: dict[str, Any], takes: str | None) -> str:
    """What to say of a behavior below its floor."""
    before, after = row[f"reference_{row['of']}"], row[row["of"]]
    text = f"behavior {row['name']}: {row['of']} is {after:.3g}, of {before:.3g} keep is {row['keep']:g}"
    return text + (f"; plans kept all behaviors at {takes}" if takes else "")
