"""Tasks of lm-evaluation-harness on a model, and two models on the same tasks, document by document.

Two models answer the same documents, so their difference is known far better than either score: the standard error of
the difference is that of the paired differences (Miller 2024, arXiv 2411.00640, section 4), and `recovery` is the
share of the reference's score that is left.

Tasks are the harness's own or YAML files in a folder of the user's; data files that those name with relative paths are
looked for in `data`. What changes numbers in silence is kept beside them: versions, shots, chat template, whether the
tokenizer puts a beginning-of-text token first.
"""

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from ..console import Advance, ignore
from ..errors import CircuitpressError

log = logging.getLogger(__name__)

BATCHES = 64
"""Batches between two lines of progress in a log file."""


@dataclass(frozen=True)
class TaskSettings:
    """What is asked of the harness; `shots` and `limit` (documents of each task) as the task says where None."""

    tasks: tuple[str, ...]
    include: Path | None = None
    data: Path | None = None
    shots: int | None = None
    limit: int | None = None
    chat_template: bool = False
    batch_size: int = 16
    seed: int = 1234


@dataclass(frozen=True, eq=False)
class TaskScore:
    """One metric of one task or group of tasks.

    `documents` float64 [n] holds the metric of each document where the score is their mean (accuracies), else it is
    empty (perplexities). `stderr` is the harness's, None where it has none.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool
    shots: int | None
    version: str
    dataset: str | None
    """The Hub id of its data; None for local files and groups."""
    documents: np.ndarray


@dataclass(frozen=True, eq=False)
class TaskRun:
    """All scores of one model and what they depend on; `asked` are the tasks and groups that are no part of another."""

    scores: tuple[TaskScore, ...]
    asked: tuple[str, ...]
    provenance: Mapping[str, Any]


@dataclass(frozen=True)
class TaskComparison:
    """One metric of a reference and of a model. `difference` is model - reference; `recovery` the share that is left,
    above 1 for a model that does better, and None where the reference scores 0."""

    task: str
    metric: str
    reference: float
    reference_stderr: float | None
    value: float
    stderr: float | None
    difference: float
    difference_stderr: float | None
    recovery: float | None
    documents: int | None
    higher_is_better: bool
    shots: int | None
    version: str
    dataset: str | None
    asked: bool
    """Whether it is what was asked for, by name, pattern or tag, and not a part of a group that was."""

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def run_tasks(folder: Path, settings: TaskSettings, *, device: str = "cpu", advance: Advance = ignore) -> TaskRun:
    """Runs the tasks on the model in `folder`; `advance` hears of every batch.

    Raises CircuitpressError for tasks that the harness does not know and for data that it cannot load.
    """
    import lm_eval
    import lm_eval.evaluator

    from .harness import CircuitpressLM

    evaluate: Any = lm_eval.simple_evaluate  # its decorator hides the signature from type checkers
    # What the harness and the data library print goes to the log: stdout is for results.
    with _into_log():
        manager, chosen = _find(settings)
        model = CircuitpressLM(str(folder), device=device, batch_size=settings.batch_size, quiet=True)
        handle = model.model.register_forward_hook(_counter(advance))
        try:
            # It would ask git for the commit of the working directory, which is not ours and may be in no repository.
            nothing = mock.patch.object(lm_eval.evaluator, "get_git_commit_hash", return_value=None)
            with _data_of(settings), nothing:
                results = evaluate(
                    model=model, tasks=chosen, task_manager=manager, num_fewshot=settings.shots, limit=settings.limit,
                    apply_chat_template=settings.chat_template, bootstrap_iters=1000, random_seed=settings.seed,
                    numpy_random_seed=settings.seed, torch_random_seed=settings.seed, fewshot_random_seed=settings.seed,
                )  # fmt: skip
        finally:
            handle.remove()
    probe = model.tokenizer("a").input_ids  # pyright: ignore
    return TaskRun(
        tuple(_scores(results)),
        tuple(_roots(results)),
        {
            "lm_eval": results["lm_eval_version"],
            "transformers": results["transformers_version"],
            "limit": settings.limit,
            "chat_template": results.get("chat_template_sha") if settings.chat_template else None,
            "prepends_bos": bool(probe) and probe[0] == model.tokenizer.bos_token_id,  # pyright: ignore
            "max_length": results["max_length"],
            "seed": settings.seed,
        },
    )


def check_tasks(settings: TaskSettings) -> None:
    """Raises what `run_tasks` would raise for unknown tasks and missing data, before hours of other work."""
    with _into_log():
        manager, chosen = _find(settings)
        with _data_of(settings):
            manager.load(chosen)


def compare_runs(reference: TaskRun, model: TaskRun) -> list[TaskComparison]:
    """The two runs side by side; both must be of the same tasks and documents."""
    theirs = {(score.task, score.metric): score for score in reference.scores}
    return [_compare(theirs[score.task, score.metric], score, reference.asked) for score in model.scores]


def mean_recovery(rows: Sequence[TaskComparison]) -> float | None:
    """Mean recovery of the tasks that were asked for, by accuracy where there is one, else by the first metric.

    None if there is none to average.
    """
    chosen: dict[str, TaskComparison] = {}
    for row in rows:
        if row.asked and (row.task not in chosen or row.metric == "acc"):
            chosen[row.task] = row
    found = [row.recovery for row in chosen.values() if row.recovery is not None]
    return float(np.mean(found)) if found else None


def _compare(reference: TaskScore, score: TaskScore, asked: Sequence[str]) -> TaskComparison:
    paired = None
    if score.documents.size > 1 and score.documents.size == reference.documents.size:
        change = score.documents - reference.documents
        paired = float(change.std(ddof=1) / np.sqrt(change.size))
    part, whole = score.value, reference.value
    if not score.higher_is_better:
        part, whole = whole, part
    return TaskComparison(
        task=score.task,
        metric=score.metric,
        reference=reference.value,
        reference_stderr=reference.stderr,
        value=score.value,
        stderr=score.stderr,
        difference=score.value - reference.value,
        difference_stderr=paired,
        recovery=part / whole if whole else None,
        documents=score.documents.size or None,
        higher_is_better=score.higher_is_better,
        shots=score.shots,
        version=score.version,
        dataset=score.dataset,
        asked=score.task in asked,
    )


def _scores(results: Mapping[str, Any]) -> Iterator[TaskScore]:
    """Groups first, then tasks, as the harness lists them."""
    groups = results.get("groups") or {}
    for name, entry in [*groups.items(), *((n, e) for n, e in results["results"].items() if n not in groups)]:
        leaves = _leaves(name, results["group_subtasks"])
        for key, value in entry.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            label = metric if chosen == "none" else f"{metric} ({chosen})"
            stderr = entry.get(f"{metric}_stderr,{chosen}")
            first = leaves[0]
            yield TaskScore(
                task=name,
                metric=label,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
                higher_is_better=bool(results["higher_is_better"].get(first, {}).get(metric, True)),
                shots=results["n-shot"].get(first),
                version=str(results["versions"].get(name, results["versions"].get(first))),
                dataset=_dataset(results["configs"].get(name, {})),
                documents=_documents(results["samples"], leaves, metric, chosen, float(value)),
            )


def _roots(results: Mapping[str, Any]) -> list[str]:
    """Names of patterns and tags are gone by now; what they stand for is what no group holds."""
    subtasks = results["group_subtasks"]
    inside = {child for children in subtasks.values() for child in children}
    names: dict[str, Any] = results["results"] | (results.get("groups") or {})
    return [name for name in names if name not in inside]


def _dataset(config: Mapping[str, Any]) -> str | None:
    path = config.get("dataset_path")
    return path if isinstance(path, str) and path.count("/") == 1 else None


def _leaves(name: str, subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group, groups in groups resolved; a task is its own."""
    if not subtasks.get(name):
        return [name]
    return [leaf for child in subtasks[name] for leaf in _leaves(child, subtasks)]


def _documents(
    samples: Mapping[str, Sequence[Mapping[str, Any]]], leaves: Sequence[str], metric: str, chosen: str, value: float
) -> np.ndarray:
    """The metric of every document, if the score is their mean: what is aggregated otherwise has no paired error."""
    found = [
        row[metric]
        for leaf in leaves
        for row in sorted(samples.get(leaf, []), key=lambda row: row["doc_id"])
        if row.get("filter") == chosen and isinstance(row.get(metric), (int, float))
    ]
    values = np.array(found, dtype=np.float64)
    return values if values.size and abs(values.mean() - value) < 1e-9 else np.empty(0)


def _find(settings: TaskSettings) -> tuple[Any, list[str]]:
    """The harness's index of tasks and the names asked for, patterns resolved.

    Its own tasks take ten seconds to list; where a local folder holds all that is asked, they are left out.
    """
    from lm_eval.tasks import TaskManager

    if settings.include is not None and not settings.include.is_dir():
        raise CircuitpressError(f"{settings.include}: no such folder of tasks", hint="--include DIR holds task YAMLs")
    include = None if settings.include is None else str(settings.include.resolve())
    missing: list[str] = []
    for defaults in (False, True) if include else (True,):
        manager = TaskManager(include_path=include, include_defaults=defaults)
        missing = [name for name in settings.tasks if not manager.match_tasks([name])]
        if not missing:
            return manager, manager.match_tasks(list(settings.tasks))
    where = f" and {settings.include}" if include else ""
    raise CircuitpressError(
        f"no task called {', '.join(missing)} in lm-evaluation-harness{where}",
        hint="circuitpress lm-eval ls tasks lists its own; --include DIR adds a folder of task YAMLs",
    )


def _counter(advance: Advance) -> Any:
    total = 0

    def hook(module: Any, inputs: Any, output: Any) -> None:
        nonlocal total
        del module, inputs
        total += output.logits.shape[0] * output.logits.shape[1]
        advance(1 / BATCHES, f"{total:,} tokens")

    return hook


@contextlib.contextmanager
def _data_of(settings: TaskSettings) -> Iterator[None]:
    """The working directory that relative data files start from; data that does not load is a CircuitpressError."""
    try:
        with contextlib.chdir(settings.data or Path.cwd()):
            yield
    except OSError as error:
        raise CircuitpressError(
            f"the data of {', '.join(settings.tasks)} cannot be loaded: {error}",
            hint="--task-data DIR names the folder that relative paths of local tasks start from; "
            "tasks of the harness need the network once",
        ) from error


@contextlib.contextmanager
def _into_log() -> Iterator[None]:
    noise = io.StringIO()
    try:
        with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
            yield
    finally:
        for line in noise.getvalue().replace("\r", "\n").splitlines()[-50:]:
            log.debug("lm-eval: %s", line)
