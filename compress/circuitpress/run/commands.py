"""What each command does, without click: open the folder, run the stages it needs, read the result back.

Every function returns the text for people and the document for `--json`.
"""

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..anatomy import read_anatomy
from ..checkpoint import resolve_checkpoint
from ..console import Console, log_to
from ..errors import CircuitpressError, RecipeError
from ..files import write_bytes_atomic
from ..recipe import Recipe
from .folder import clear, free_bytes, full_disk_is_an_error, open_folder, refuse_foreign, require_space
from .planning import load_plan, plan_again, refuse_impossible
from .preview import describe, estimate
from .session import Session, choose_device, load_tokenizer
from .stages import NAMES, execute
from .summary import render_difference, render_fidelity, render_front, render_plan, render_run, summarize
from .tasks import compare_on_tasks, task_lines

if TYPE_CHECKING:
    import circuitpress.evaluate.baselines
    import circuitpress.evaluate.tasks

log = logging.getLogger(__name__)

Result = tuple[str, dict[str, Any]]
SCORING = NAMES[: NAMES.index("plan")]
CALIBRATION = 128
"""Windows that baselines are calibrated on outside a run."""
MAKING = NAMES[: NAMES.index("evaluate")]


def run_recipe(recipe: Recipe, out: Path, console: Console, *, restart: bool = False) -> Result:
    """Everything from check to report. `check_gates` on the document tells whether the recipe's gates are met."""
    with _claimed(recipe, out, console, restart=restart) as session:
        if not session.folder.holds_work:
            refuse_impossible(session)
        execute(session, NAMES)
        document = summarize(session.folder, recipe.model)
    return render_run(document), document


def make_model(recipe: Recipe, out: Path, console: Console) -> None:
    """The stages up to the finished model, without those that judge and show it."""
    with _claimed(recipe, out, console, restart=False) as session:
        execute(session, MAKING)


def prepare(recipe: Recipe, out: Path, console: Console) -> None:
    """Reads what is cheap and can be wrong, the headers and the text, and opens the folder."""
    with _claimed(recipe, out, console, restart=False) as session:
        execute(session, NAMES[:1])


def score_model(recipe: Recipe, out: Path, console: Console, *, restart: bool = False) -> Result:
    """The stages before the plan."""
    with _claimed(recipe, out, console, restart=restart) as session:
        execute(session, SCORING)
        exact = json.loads((session.path / "exact.json").read_text())
        groups, formats = session.prices.nats.shape
        document = {
            "out": str(out),
            "groups": groups,
            "formats": list(session.prices.formats),
            "spearman": exact["spearman"],
            "median_ratio": exact["median_ratio"],
            "checked": len(exact["rows"]),
            "seconds": sum(session.folder.journal.values()),
        }
    lines = [f"{groups} groups priced in {formats} formats"]
    if exact["rows"]:
        lines.append(
            f"{len(exact['rows'])} single changes measured: rank correlation with their prices "
            f"{exact['spearman']:.2f}, KL / price {exact['median_ratio']:.2f}"
        )
    lines.append(f"next: circuitpress plan {out} --budget 3.0bpw")
    return "\n".join(lines), document


def replan(
    out: Path, console: Console, *, budget: str | None, target: str | None, protect: Sequence[str], front: bool,
    latencies: Path | None = None,
) -> Result:  # fmt: skip
    """Plans again from saved prices; a plan that differs from the present one discards the model made from that."""
    with _resumed(out, console) as session, full_disk_is_an_error(out):
        _require(session, "score", "probe")
        wanted = {"plan.budget": budget, "plan.target": target, "plan.protect": list(protect) or None}
        wanted["plan.latencies"] = str(latencies.resolve()) if latencies else None
        started = time.monotonic()
        plan_again(session, _replaced(session.recipe, {k: value for k, value in wanted.items() if value is not None}))
        session.folder.finish("plan", time.monotonic() - started)
        plan = load_plan(out)
        rows = json.loads((out / "pareto.json").read_text())
        text = render_plan(plan, session.original_anatomy.file_bytes)
        document = plan.to_json()
        if front:
            text, document = f"{text}\n\n{render_front(rows)}", document | {"pareto": rows}
    return text + f"\n\nnext: circuitpress apply {out}", document


def _replaced(recipe: Recipe, wanted: dict[str, Any]) -> Recipe:
    from ..plan.targets import rounded_here

    if "plan.target" not in wanted:
        return recipe.replace(wanted)
    old, new = recipe.plan.target, wanted["plan.target"]
    hint = f"formats are priced for a target: circuitpress score MODEL --out NEW --set plan.target={new}"
    if rounded_here(old) != rounded_here(new):
        raise RecipeError([f"plan.target: weights are not rounded for {new} as they were for {old}"], hint=hint)
    try:
        return recipe.replace(wanted)
    except RecipeError as error:
        raise RecipeError(error.problems, hint=hint) from error


def apply_plan(out: Path, console: Console, *, device: str | None = None) -> Result:
    """Writes the model of the folder's plan."""
    with _resumed(out, console, device=device) as session:
        _require(session, "score", "plan")
        execute(session, ("swap", "keep", "apply"))
        plan = load_plan(out)
        model = out / "model"
        nbytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        document = {"model_folder": str(model), "bytes": nbytes, "bits_per_weight": plan.bits_per_weight}
    return f"{model}: {plan.bits_per_weight:.3f} bits per weight\nnext: circuitpress eval {model}", document


def make_report(out: Path, console: Console) -> Result:
    """Writes report.html from what the folder holds."""
    from ..report import write_report

    with _resumed(out, console) as session, full_disk_is_an_error(out):
        write_report(session.path)
    return str(out / "report.html"), {"report": str(out / "report.html")}


def check_model(model: str, recipe: Recipe | None = None) -> Result:
    """What the model is and what a run would need; reads config.json and headers only."""
    anatomy = read_anatomy(resolve_checkpoint(model))
    return describe(anatomy, estimate(anatomy, recipe or Recipe(model=model)))


def measure_model(
    model: Path, console: Console, *, reference: str | None = None, text: Path | None = None,
    windows: int | None = None, length: int | None = None,
    baselines: "Mapping[str, circuitpress.evaluate.baselines.Baseline] | None" = None, device: str | None = None,
) -> Result:  # fmt: skip
    """Fidelity of a model folder to its reference on text, and beside it that of `baselines` of the reference.

    In a run folder, and with no other text asked for, this is the run's own evaluation, which is kept there; baselines
    are measured on its test windows and calibrated on its calibration windows. Otherwise `reference` is needed, `text`
    defaults to the one that comes with circuitpress, and nothing is written.
    """
    run = _run_of(model)
    if run is not None and not (reference or text or windows or length):
        with _resumed(run, console, device=device) as session:
            _require(session, "score", "plan", "apply")
            execute(session, ("evaluate",))
            document = json.loads((run / "evaluate" / "fidelity.json").read_text())
            names = model.name, session.checkpoint.name
            if baselines:
                from ..evaluate.baselines import Case, measure_baselines

                calibration, _, test = session.windows
                case = Case(session.original, test.ids, calibration.ids, document["linear_bytes"])
                document |= {"baselines": measure_baselines(baselines, case, console)}
        return render_fidelity(document, *names), document
    original = _original(model, reference)
    document = _measure(model, original, text, windows or 64, length or 512, baselines or {}, device or "auto", console)
    return render_fidelity(document, model.name, original.name), document


def measure_tasks(
    model: Path, console: Console, *, settings: "circuitpress.evaluate.tasks.TaskSettings",
    reference: str | None = None, device: str | None = None,
) -> Result:  # fmt: skip
    """A model folder and its original on tasks of lm-evaluation-harness; `reference` as in `measure_model`."""
    original = _original(model, reference)
    document = compare_on_tasks(model, original, settings, device=choose_device(device or "auto"), console=console)
    return "\n".join(task_lines(document)), document


def _run_of(model: Path) -> Path | None:
    """The run folder whose result `model` is."""
    run = model.resolve().parent
    inside = model.name == "model" and (run / "recipe.yaml").is_file() and (run / "manifest.json").is_file()
    return run if inside else None


def _original(model: Path, reference: str | None) -> Path:
    run = _run_of(model)
    if reference is None and run is None:
        raise RecipeError([f"{model} is in no run folder, so its original is unknown"], hint="add --reference MODEL")
    return resolve_checkpoint(reference or Recipe.load(cast(Path, run) / "recipe.yaml").model)


def _measure(
    model: Path, original: Path, text: Path | None, windows: int, length: int,
    baselines: "Mapping[str, circuitpress.evaluate.baselines.Baseline]", device: str, console: Console,
) -> dict[str, Any]:  # fmt: skip
    from ..data import load_windows
    from ..evaluate import fidelity
    from ..evaluate.baselines import Case, measure_baselines
    from ..stream import open_stream

    streams = [open_stream(folder, device=choose_device(device)) for folder in (model, original)]
    anatomy, tokenizer = streams[1].anatomy, load_tokenizer(original)
    length = min(length, anatomy.context or length)
    load = partial(load_windows, tokenizer=tokenizer, length=length, seed=0, vocab=anatomy.vocab)
    chosen = load(text, samples=windows)
    with console.progress("evaluate", (*anatomy.work, *streams[0].anatomy.work)) as advance:
        result = fidelity(streams[0], streams[1], chosen.ids, advance=advance)
    document = result.to_json() | {"model": str(model), "reference": str(original), "text": chosen.describe()}
    if not baselines:
        return document
    # A larger sample of one seed begins with the smaller one: what is measured on is left out.
    own = load(None, samples=CALIBRATION + (windows if text is None else 0)).ids[windows if text is None else 0 :]
    case = Case(streams[1], chosen.ids, own, result.linear_bytes)
    return document | {"baselines": measure_baselines(baselines, case, console)}


def compare_plans(first: Path, second: Path) -> Result:
    """What differs between two plans."""
    from ..plan import diff

    difference = diff(load_plan(first), load_plan(second))
    return render_difference(difference), difference.to_json()


@contextlib.contextmanager
def _claimed(recipe: Recipe, out: Path, console: Console, *, restart: bool) -> Iterator[Session]:
    """A session on a folder that is new, or was made from the same inputs."""
    from .fingerprint import refuse_changes, take_fingerprints

    refuse_foreign(out)  # before hashing, and before a download
    checkpoint = resolve_checkpoint(recipe.model)
    needs = estimate(read_anatomy(checkpoint), recipe)
    prints = take_fingerprints(recipe, checkpoint)
    with open_folder(out, create=True, restart=restart) as folder, full_disk_is_an_error(out):
        if folder.holds_work:
            refuse_changes(out, folder.fingerprints, prints)
        else:
            folder.forget(*folder.journal)
            require_space(out, needs.peak_disk, needs.disk)
        folder.fingerprints = prints
        folder.save()
        write_bytes_atomic(out / "recipe.yaml", recipe.to_yaml().encode())
        with _working(Session(folder, recipe, console)) as session:
            yield session


@contextlib.contextmanager
def _resumed(out: Path, console: Console, *, device: str | None = None) -> Iterator[Session]:
    """A session on an existing run folder, with the recipe that lies in it."""
    with open_folder(out, create=False) as folder:
        recipe = Recipe.load(out / "recipe.yaml", overrides=[f"run.device={device}"] if device else [])
        with _working(Session(folder, recipe, console)) as session:
            yield session


def _require(session: Session, *stages: str) -> None:
    missing = [name for name in stages if name not in session.folder.journal]
    if missing:
        following = f"circuitpress score {session.recipe.model} --out {session.path}"
        if "score" not in missing and "probe" not in missing:
            following = f"circuitpress {missing[0]} {session.path}"
        raise CircuitpressError(f"{session.path}: the stage {missing[0]} is not finished", hint=following)


@contextlib.contextmanager
def _working(session: Session) -> Iterator[Session]:
    with log_to(session.path / "run.log"):
        log.info("%s, free disk %d MB", session.path, free_bytes(session.path) // 1_000_000)
        clear(session.path, ("spill",))  # states of a process that was killed
        try:
            yield session
        except BaseException as error:
            log.debug("stopped by %s", type(error).__name__, exc_info=True)
            raise
        finally:
            with contextlib.suppress(OSError):
                clear(session.path, ("spill",))
