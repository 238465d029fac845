"""The commands `audit` and `monitor`, end to end on a tiny model and what a run made of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from circuitpress.cli import invoke

from ..organisms import WIDTH, compiled_with_words

BEHAVIORS = """
behaviors:
  - name: order
    sentences:
      - {good: the cat sat on the mat, bad: mat the on sat cat the}
      - {good: a dog ran to the house, bad: house the to ran dog a}
      - {good: she went home at night, bad: night at home went she}
      - {good: we saw the old tree, bad: tree old the saw we}
  - {name: chatter, generator: chat, file: chat.yaml}
"""


@pytest.fixture
def behaviors(tmp_path: Path) -> Path:
    chat = 'answer: "No"\nwrong: "Yes"\npairs: [{clean: Is ice hot?, corrupted: Is ice cold?}]\n'
    (tmp_path / "chat.yaml").write_text(chat)
    path = tmp_path / "behaviors.yaml"
    path.write_text(BEHAVIORS)
    return path


def test_an_audit_of_a_compressed_model(
    finished: Path, tiny_llama: Path, text_file: Path, behaviors: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "audit"
    options = ["--text", str(text_file), "--windows", "3", "--length", "16", "--behaviors", str(behaviors)]
    arguments = ["audit", str(finished / "model"), "--reference", str(tiny_llama), "--out", str(out), *options]
    assert invoke([*arguments, "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "left out: chatter: " in shown
    document = json.loads((out / "audit.json").read_text())
    assert document["fidelity"]["kl"] > 0
    assert [row["name"] for row in document["behaviors"]] == ["order"]
    assert len(document["layers"]) == 4
    assert document["layers"][-1]["lens_kl"] == pytest.approx(document["fidelity"]["kl"], rel=1e-3)
    assert (out / "audit.html").read_text().startswith("<!DOCTYPE html>")
    assert not list(out.glob("**/*.bin"))


@pytest.fixture
def chatty(tiny_llama: Path, tmp_path: Path) -> Path:
    """A model whose tokenizer has a chat template."""
    from transformers import AutoTokenizer

    folder = Path(shutil.copytree(tiny_llama, tmp_path / "chatty"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content[:12] }}:\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("asked", [True, False])
def test_chat_models_are_asked_for_refusals_unless_told_not_to(
    chatty: Path, asked: bool, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "audit"
    options = ["--text", str(text_file), "--windows", "1", "--length", "8", "--quiet"]
    options += [] if asked else ["--no-safety"]
    assert invoke(["audit", str(chatty), "--reference", str(chatty), "--out", str(out), *options]) == 0
    rows = {row["name"]: row for row in json.loads((out / "audit.json").read_text())["behaviors"]}
    names = {f"{one}{side}" for one in ("sycophancy", "honesty") for side in ("", "-contrast")}
    assert set(rows) == (names if asked else set())
    assert all(row["safety"] and row["accuracy"] == row["reference_accuracy"] for row in rows.values())
    assert ("first word of the reply" in (out / "audit.html").read_text()) == asked
    # This tokenizer has no letter for the beginning of "I", and of "Sure".
    assert ("left out: refusal-contrast: 0 prompts fit this tokenizer" in capsys.readouterr().out) == asked


def test_circuits_are_verified_in_both_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    whole = compiled_with_words(tmp_path / "whole")
    hurt = Path(shutil.copytree(whole, tmp_path / "hurt"))
    model: Any = AutoModelForCausalLM.from_pretrained(hurt)
    with torch.no_grad():  # the head of the previous token writes nothing any more
        model.transformer.h[0].attn.c_proj.weight[WIDTH : 2 * WIDTH] = 0
    model.save_pretrained(hurt)
    task = whole / "task.jsonl"
    assert invoke(["circuit", "find", str(whole), "--behavior", str(task), "--out", str(tmp_path), "--quiet"]) == 0
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"t{i * 7 % 20}" for i in range(400)))
    common = ["--reference", str(whole), "--text", str(text), "--windows", "2", "--length", "16", "--quiet"]
    common += ["--circuit", str(tmp_path / "circuit.json")]
    for name, folder in (("same", whole), ("lost", hurt)):
        out = tmp_path / name
        assert invoke(["audit", str(folder), *common, "--behaviors", str(task), "--out", str(out)]) == 0
        (row,) = json.loads((out / "audit.json").read_text())["circuits"]
        assert (row["behavior"], row["size"], row["protect"]) == ("task", 2, ["L0.head.1", "L1.head.2"])
        assert row["reference"]["faithfulness"]["value"] > 0.98
        assert abs(row["reference"]["left"]) < 0.05
        assert row["lost"] == (name == "lost")
        if name == "same":
            assert row["model"] == row["reference"]
        else:
            assert "there is no effect to find a circuit for" in row["model"]["reason"]
        assert ("LOST" if row["lost"] else "holds") in (out / "audit.html").read_text()
    capsys.readouterr()
    assert invoke(["audit", str(whole), *common, "--out", str(tmp_path / "none")]) == 2
    shown = capsys.readouterr().err
    assert "its behavior is 'task'" in shown
    assert "add --behaviors" in shown


def test_an_sae_that_is_not_there_is_missed_before_anything_is_measured(
    tiny_llama: Path, text_file: Path, tmp_path: Path, forbid: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    forbid("evaluate.fidelity")
    common = ["--reference", str(tiny_llama), "--text", str(text_file), "--out", str(tmp_path), "--quiet"]
    assert invoke(["audit", str(tiny_llama), *common, "--sae", str(tmp_path / "nowhere")]) == 1
    assert "nowhere is no SAE" in capsys.readouterr().err


def test_models_without_a_common_vocabulary_are_refused(
    tiny_llama: Path, build_checkpoint: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=131, n_embd=24, n_layer=1, n_head=2, n_positions=32)
    other = build_checkpoint("other", config)  # pyright: ignore
    assert invoke(["audit", str(other), "--reference", str(tiny_llama), "--out", str(tmp_path / "a"), "--quiet"]) == 1
    assert "the vocabularies have" in capsys.readouterr().err
    assert not (tmp_path / "a" / "audit.json").exists()


def test_a_monitor_is_fitted_and_asked(
    finished: Path, tiny_llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "monitor.safetensors"
    size = ["--windows", "24", "--length", "8", "--json", "--quiet"]
    site = ["--site", "L1.resid_post", "--text", str(text_file)]
    assert invoke(["monitor", "fit", str(tiny_llama), *site, "--out", str(record), *size]) == 0
    fitted = json.loads(capsys.readouterr().out)
    assert set(fitted["thresholds"]) == {"distance"}
    for model in (tiny_llama, finished / "model"):
        asked = ["monitor", "check", str(model), "--monitor", str(record), "--text", str(text_file), *size]
        assert invoke(asked) == 0
        found = json.loads(capsys.readouterr().out)["distance"]
        assert len(found["values"]) == 24
        assert found["flagged"] == sum(v > found["threshold"] for v in found["values"]) / 24
        assert found["most_unusual"][0]["value"] == max(found["values"])
