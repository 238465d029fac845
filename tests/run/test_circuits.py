"""`circuit find` and `circuit verify` from the command line, on the compiled induction circuit."""

import json
from pathlib import Path

import pytest

from circuitpress.cli import invoke

from ..organisms import TOKENS, compiled_with_words


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled_with_words(tmp_path_factory.mktemp("compiled"))


def run(*arguments: object) -> int:
    """The exit code of a quiet command."""
    return invoke(["circuit", *map(str, arguments), "--quiet"])


def test_find_then_verify(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, task = tmp_path / "found", model / "task.jsonl"
    assert run("find", model, "--behavior", task, "--out", out, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert [node["node"] for node in document["nodes"]] == ["L0.head.1", "L1.head.2"]
    assert document["protect"] == ["L0.head.1", "L1.head.2"]
    assert document["evidence"] == "causal"
    assert document["provenance"]["behavior"] == "task"
    assert {path.name for path in out.iterdir()} == {"circuit.json", "circuit.svg"}
    assert json.loads((out / "circuit.json").read_text()) | {"files": document["files"]} == document

    assert run("verify", model, "--circuit", out / "circuit.json", "--behavior", task, "--random", 50) == 0
    text = capsys.readouterr().out
    assert "circuit of task: 2 of 10 nodes, resample ablation, causal" in text
    assert "random circuits (45 all)" in text
    assert "without L1.head.2" in text
    saved = json.loads((out / "verify.json").read_text())
    assert saved["faithfulness"]["value"] > 0.98
    assert saved["random"]["count"] == 45


def test_edges_and_another_place_for_the_result(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = model / "task.jsonl"
    options = ("--edges", "--selection", "greedy", "--size", 3, "--out", tmp_path)
    assert run("find", model, "--behavior", task, *options) == 0
    text = capsys.readouterr().out
    assert "5 midpoints (gradient); chosen by ablation" in text
    assert "L0.head.1>L1.kv_group.2.k" in text
    verify = ("verify", model, "--circuit", tmp_path / "circuit.json", "--behavior", task, "--out", tmp_path / "other")
    assert run(*verify, "--ablation", "zero", "--random", 5, "--subsets", 0, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["granularity"], document["ablation"], document["size"]) == ("edges", "zero", 3)
    assert (tmp_path / "other" / "verify.json").exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--size", 2, "--faithfulness", 0.5), 2, "--size and --faithfulness both say where to cut"),
        (("--name", "ioi"), 2, "no behavior 'ioi'"),
        (("--method", "guess"), 2, "--method"),
    ],
)
def test_options_that_cannot_be(
    options: tuple[object, ...], code: int, message: str, model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run("find", model, "--behavior", model / "task.jsonl", "--out", tmp_path, *options) == code
    assert message in capsys.readouterr().err


def test_prompts_that_do_not_fit_the_model(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = " ".join(f"t{i % TOKENS}" for i in range(30))
    row = {"clean": f"t1 {words}", "corrupted": f"t2 {words}", "answer": " t3", "wrong": " t4"}
    (tmp_path / "long.jsonl").write_text(json.dumps(row))
    assert run("find", model, "--behavior", tmp_path / "long.jsonl", "--out", tmp_path) == 1
    assert "prompts of 31 tokens" in capsys.readouterr().err


def test_a_missing_circuit(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--circuit", tmp_path / "none.json", "--behavior", model / "task.jsonl")
    assert run("verify", model, *options) == 1
    assert "cannot read the circuit" in capsys.readouterr().err
