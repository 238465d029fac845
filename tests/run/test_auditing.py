"""The commands `audit` and `monitor`, end to end on a tiny model and what a run made of it."""

import json
from pathlib import Path

import pytest

from circuitpress.cli import invoke

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
