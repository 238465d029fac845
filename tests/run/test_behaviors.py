"""`check MODEL --behaviors FILE`: what a model can do, what it cannot, what its tokenizer cannot express."""

import json
from pathlib import Path

import pytest

from circuitpress.cli import invoke

RECIPES = Path(__file__).parents[2] / "recipes"


def test_the_demo_model_knows_grammar_and_no_induction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "b.yaml"
    agreement = RECIPES / "behaviors" / "agreement.jsonl"
    file.write_text(
        f"- {{name: agreement, generator: blimp, file: {agreement}, samples: 24}}\n"
        "- {name: induction, generator: induction, samples: 24}\n"
        "- {name: refusal, generator: chat, file: refusal.yaml}\n"
    )
    model = str(RECIPES / "demo" / "checkpoint")
    assert invoke(["check", model, "--behaviors", str(file), "--json", "--quiet", "--device", "cpu"]) == 0
    document = json.loads(capsys.readouterr().out)
    agreement, induction = document["behaviors"]
    assert (agreement["able"], induction["able"]) == (True, False)
    assert agreement["accuracy"] >= 0.9
    assert agreement["p_value"] < 1e-4 < induction["p_value"]
    assert (agreement["metric"], agreement["pairs"]) == ("sentence", 24)
    assert document["unfit"] == {
        "refusal": "chat: the tokenizer has no chat template: this behavior is for chat models"
    }
    assert invoke(["check", model, "--behaviors", str(file), "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "can do 1 of 2 behaviors" in out
    assert "left out: refusal: chat: the tokenizer has no chat template" in out
    assert "check" in err


def test_faults_end_with_a_screen_and_a_code(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "b.yaml"
    assert invoke(["check", str(tiny_llama), "--behaviors", str(file)]) == 2
    assert "cannot read the behaviors" in capsys.readouterr().err
    file.write_text("- {name: long, texts: [" + "the small house and the old river " * 20 + "]}\n")
    assert invoke(["check", str(tiny_llama), "--behaviors", str(file), "--quiet", "--device", "cpu"]) == 1
    assert "the model reads 64" in capsys.readouterr().err
