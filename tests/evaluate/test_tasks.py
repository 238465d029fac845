"""Tasks of the harness against scores computed by hand from transformers' own logits, and pairs of runs."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from circuitpress.errors import CircuitpressError
from circuitpress.evaluate.tasks import (
    TaskComparison,
    TaskRun,
    TaskScore,
    TaskSettings,
    check_tasks,
    compare_runs,
    mean_recovery,
    run_tasks,
)

PAIRS = [
    ("the river runs to the sea", "the sea runs river the to"),
    ("she looked at the old house", "house old the at looked she"),
    ("a man of great age", "age great of man a"),
    ("in the morning they went", "went they morning the in"),
    ("it was not a good day", "day good a not was it"),
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of pairs, one with a word to guess, and a group of the first with another name."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data").mkdir()
    rows = [{"good": good, "bad": bad} for good, bad in PAIRS]
    (folder / "data" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [{"context": good.rpartition(" ")[0], "word": good.rpartition(" ")[2]} for good, _ in PAIRS]
    (folder / "data" / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in words))
    pairs = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "pairs.jsonl"}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[good, bad]}}",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 3.0},
    }
    last = {
        "task": "last_word",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "words.jsonl"}},
        "output_type": "loglikelihood",
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "doc_to_target": " {{word}}",
        "target_delimiter": "",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    }
    group = {
        "group": "both",
        **{key: value for key, value in pairs.items() if key != "metadata"},
        "task": [{"task": "one"}, {"task": "two"}],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
        "metadata": {"version": 1.0},
    }
    for name, document in {"pairs": {"task": "pairs", **pairs}, "last": last, "both": group}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(document))
    return folder


def _settings(tasks: Path, *names: str, limit: int | None = None) -> TaskSettings:
    return TaskSettings(names, tasks, tasks / "data", limit=limit, batch_size=2)


def _log_probability(folder: Path, context: str, continuation: str) -> float:
    """Summed float64 log-probability of the tokens that `continuation` adds; without context, after a first token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    if context:
        whole, known = tokenizer(context + continuation).input_ids, len(tokenizer(context).input_ids)
    else:
        whole, known = [tokenizer.bos_token_id or tokenizer.eos_token_id, *tokenizer(" " + continuation).input_ids], 1
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return float(sum(logits[i - 1, whole[i]] for i in range(known, len(whole))))


def test_scores_are_those_of_transformers(tiny_llama: Path, tasks: Path) -> None:
    seen: list[str] = []
    run = run_tasks(tiny_llama, _settings(tasks, "pairs", "last_word"), advance=lambda _, note: seen.append(note))
    scores = {(score.task, score.metric): score for score in run.scores}
    right = [_log_probability(tiny_llama, "", a) > _log_probability(tiny_llama, "", b) for a, b in PAIRS]
    assert scores["pairs", "acc"].documents.tolist() == [float(x) for x in right]
    assert scores["pairs", "acc"].value == pytest.approx(np.mean(right))
    assert scores["pairs", "acc"].version == "3.0" and scores["pairs", "acc"].shots == 0
    words = [_log_probability(tiny_llama, good.rpartition(" ")[0], " " + good.rpartition(" ")[2]) for good, _ in PAIRS]
    perplexity = scores["last_word", "perplexity"]
    assert perplexity.value == pytest.approx(np.exp(-np.mean(words)), rel=1e-4)
    assert not perplexity.higher_is_better and perplexity.documents.size == 0
    assert seen and seen[-1].endswith("tokens")
    assert (
        run.provenance["prepends_bos"] is False and len(AutoTokenizer.from_pretrained(tiny_llama)("a").input_ids) == 1
    )


def test_a_group_pools_its_documents(tiny_llama: Path, tasks: Path) -> None:
    run = run_tasks(tiny_llama, _settings(tasks, "both", limit=3))
    first = run.scores[0]
    assert (first.task, first.documents.size) == ("both", 6)
    assert first.value == pytest.approx(first.documents.mean())
    assert {score.task for score in run.scores[1:]} == {"both::one", "both::two"}


def test_patterns_stand_for_what_they_match(tiny_llama: Path, tasks: Path) -> None:
    """The parts of a group were not asked for; what a pattern matches was."""
    assert set(run_tasks(tiny_llama, _settings(tasks, "pa*", "last_*", limit=2)).asked) == {"pairs", "last_word"}
    assert run_tasks(tiny_llama, _settings(tasks, "both", limit=2)).asked == ("both",)


def test_unknown_tasks_and_missing_data_are_named(tiny_llama: Path, tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(CircuitpressError, match="no task called nonsense"):
        run_tasks(tiny_llama, _settings(tasks, "nonsense"))
    for ask in (lambda wrong: run_tasks(tiny_llama, wrong), check_tasks):
        with pytest.raises(CircuitpressError, match="data of pairs cannot be loaded"):
            ask(TaskSettings(("pairs",), tasks, tmp_path))
    check_tasks(_settings(tasks, "pairs", "both"))
    with pytest.raises(CircuitpressError, match="no such folder of tasks"):
        run_tasks(tiny_llama, TaskSettings(("pairs",), tmp_path / "nowhere"))


def test_differences_have_the_error_of_pairs() -> None:
    before = np.array([1.0, 1, 0, 1, 0, 1, 1])
    after = np.array([1.0, 0, 0, 1, 1, 1, 0])
    (row,) = compare_runs(_run(_score("t", "acc", before)), _run(_score("t", "acc", after)))
    assert row.difference == pytest.approx(4 / 7 - 5 / 7)
    change = after - before
    assert row.difference_stderr == pytest.approx(np.sqrt(((change - change.mean()) ** 2).sum() / 6 / 7))
    assert row.recovery == pytest.approx(4 / 5) and row.documents == 7 and row.asked


def test_recovery_goes_by_accuracy_and_turns_perplexity_round() -> None:
    none = np.empty(0)
    before = _run(
        _score("t", "perplexity", none, 10.0, False), _score("t", "acc", none, 0.5), _score("u", "f1", none, 0.8)
    )
    after = _run(
        _score("t", "perplexity", none, 20.0, False), _score("t", "acc", none, 0.4), _score("u", "f1", none, 0.6)
    )
    rows = compare_runs(before, after)
    assert [row.recovery for row in rows] == pytest.approx([0.5, 0.8, 0.75])
    assert mean_recovery(rows) == pytest.approx((0.8 + 0.75) / 2)
    assert mean_recovery([]) is None
    (zero,) = compare_runs(_run(_score("t", "acc", none, 0.0)), _run(_score("t", "acc", none, 0.1)))
    assert zero.recovery is None


def test_the_harness_command_line_knows_our_model(
    tiny_llama: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from circuitpress.evaluate.harness import command_line

    monkeypatch.chdir(tasks / "data")
    monkeypatch.setattr(sys, "argv", ["pytest"])
    command_line(
        [
            "--model", "circuitpress", "--model_args", f"pretrained={tiny_llama}", "--tasks", "pairs,last_word",
            "--include_path", str(tasks), "--device", "cpu", "--output_path", str(tmp_path / "out.json"),
        ]
    )  # fmt: skip
    (file,) = tmp_path.rglob("*.json")
    theirs = json.loads(file.read_text())["results"]
    ours = {
        (score.task, score.metric): score.value
        for score in run_tasks(tiny_llama, _settings(tasks, "pairs", "last_word")).scores
    }
    assert theirs["pairs"]["acc,none"] == ours["pairs", "acc"]
    assert theirs["last_word"]["perplexity,none"] == pytest.approx(ours["last_word", "perplexity"], rel=1e-5)


def _score(task: str, metric: str, documents: np.ndarray, value: float | None = None, higher: bool = True) -> TaskScore:
    value = float(documents.mean()) if value is None else value
    return TaskScore(task, metric, value, None, higher, 0, "1", None, documents)


def _run(*scores: TaskScore) -> TaskRun:
    return TaskRun(scores, tuple(score.task for score in scores), {})


def test_rows_are_plain_json() -> None:
    (row,) = compare_runs(_run(_score("t", "acc", np.ones(3))), _run(_score("t", "acc", np.ones(3))))
    assert TaskComparison(**json.loads(json.dumps(row.to_json()))) == row
