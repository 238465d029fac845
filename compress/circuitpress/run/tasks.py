"""Benchmark tasks of lm-evaluation-harness in a run and for `eval --tasks`: original and result in one table."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import Console, table
from ..errors import RecipeError
from ..recipe import Recipe

if TYPE_CHECKING:
    import circuitpress.evaluate.tasks


def asked_by(recipe: Recipe) -> "circuitpress.evaluate.tasks.TaskSettings":
    """What a recipe asks of the harness."""
    from ..evaluate.tasks import TaskSettings

    wanted = recipe.evaluate
    return TaskSettings(
        tasks=wanted.tasks, include=wanted.include, data=wanted.task_data, shots=wanted.shots, limit=wanted.limit,
        chat_template=wanted.chat_template,
    )  # fmt: skip


def compare_on_tasks(
    model: Path, reference: Path, settings: "circuitpress.evaluate.tasks.TaskSettings", *, device: str, console: Console
) -> dict[str, Any]:
    """Both models on the same documents: a document with a row for every task and metric.

    Raises CircuitpressError for tasks that are not known and data that is not there.
    """
    from ..evaluate.tasks import compare_runs, mean_recovery, run_tasks

    _require_template(settings, reference)
    # The harness prints; the display keeps the stream that it has now.
    console = replace(console, err=console.stream)
    runs = []
    for name, folder in (("reference", reference), ("model", model)):
        with console.progress(f"tasks, {name}") as advance:
            runs.append(run_tasks(folder, settings, device=device, advance=advance))
    rows = compare_runs(*runs)
    return {
        "rows": [row.to_json() for row in rows],
        "recovery": mean_recovery(rows),
        "settings": {"tasks": list(settings.tasks), "shots": settings.shots, "limit": settings.limit},
        "provenance": dict(runs[0].provenance),
    }


def task_lines(document: dict[str, Any]) -> list[str]:
    """The table of tasks that were asked for; [] if there are none."""
    rows = [row for row in document["rows"] if row["asked"]]
    if not rows:
        return []
    lines = [("higher is better, if not marked -", "original", "result", "change", "+-")]
    for row in rows:
        name = f"{row['task']} {row['metric']}" + ("" if row["higher_is_better"] else " -")
        error = row["difference_stderr"]
        spread = "" if error is None else f"{error:.3g}"
        lines.append((name, f"{row['reference']:.4g}", f"{row['value']:.4g}", f"{row['difference']:+.3g}", spread))
    result = ["", table("tasks of lm-evaluation-harness, both on the same documents", lines)]
    if document["recovery"] is not None:
        result += ["", f"{document['recovery']:.1%} of the scores is left, on average over the tasks"]
    return result


def refuse_tasks(recipe: Recipe, reference: Path) -> None:
    """Raises what the tasks of a recipe would raise after hours: names, data files, a missing chat template."""
    if recipe.evaluate.tasks:
        from ..evaluate.tasks import check_tasks

        _require_template(asked_by(recipe), reference)
        check_tasks(asked_by(recipe))


def _require_template(settings: "circuitpress.evaluate.tasks.TaskSettings", folder: Path) -> None:
    from .session import load_tokenizer

    if settings.chat_template and getattr(load_tokenizer(folder), "chat_template", None) is None:
        raise RecipeError([f"{folder} has no chat template"], hint="leave --chat-template out")
