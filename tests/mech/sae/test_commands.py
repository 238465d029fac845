"""The `sae` commands end to end on the demo checkpoint: train, score, features, steer; errors on one screen."""

import json
from pathlib import Path

import pytest

from circuitpress.cli import invoke
from circuitpress.run.labels import open_judge

DEMO = Path(__file__).parents[3] / "recipes" / "demo"
MODEL, TEXT = str(DEMO / "checkpoint"), str(DEMO / "calibration.txt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SAE of block 1, trained by the command on 6 thousand tokens."""
    out = tmp_path_factory.mktemp("sae") / "sae"
    options = ["--site", "L1.resid_post", "--latents", "256", "--k", "12", "--tokens", "6000", "--steps", "60"]
    options += ["--batch", "256", "--length", "64", "--text", TEXT, "--out", str(out), "--quiet"]
    assert invoke(["sae", "train", MODEL, *options]) == 0
    return out


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    capsys.readouterr()
    assert invoke([*arguments, "--json", "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_training_leaves(trained: Path) -> None:
    assert sorted(path.name for path in trained.iterdir()) == ["cfg.json", "sae_weights.safetensors", "train.json"]
    document = json.loads((trained / "train.json").read_text())
    assert document["sae"]["site"] == "L1.resid_post"
    assert document["rows"] >= 6000
    assert document["quality"]["fvu"] < 0.6
    assert document["quality"]["loss_recovered"] > 0.7
    assert document["settings"]["lr"] == pytest.approx(3e-3)
    config = json.loads((trained / "cfg.json").read_text())
    assert config["metadata"]["hook_name"] == "blocks.1.hook_resid_post"


def test_score(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--text", TEXT, "--windows", "8", "--length", "48", "--top", "3", "--integrate", "4"]
    document = run(capsys, "sae", "score", MODEL, str(trained), *options)
    (features,) = document["features"]
    assert features["evidence"] == {"integrated": "gradient", "first_order": "gradient", "closed": "causal"}
    assert [len(features["rows"]), document["quality"]["evidence"]["causal"][0]] == [3, "ce_clean"]
    sizes = [abs(row["integrated"]) for row in features["rows"]]
    assert sizes == sorted(sizes, reverse=True)
    assert invoke(["sae", "score", MODEL, str(trained), "--quiet", *options]) == 0
    assert "closed (exact)" in capsys.readouterr().out


def test_features(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "features"
    options = ["--out", str(out), "--text", TEXT, "--windows", "16", "--length", "48", "--count", "4"]
    document = run(capsys, "sae", "features", MODEL, str(trained), *options)
    assert document == json.loads((out / "features.json").read_text())
    assert document["evidence"] == "correlational"
    assert len(document["parts"]) == 4
    rates = [part["firing_rate"] for part in document["parts"]]
    assert 0 < min(rates) < max(rates) <= 1
    assert (out / "features.svg").stat().st_size > 2000
    chosen = run(capsys, "sae", "features", MODEL, str(trained), *options, "--feature", "7")
    assert [part["part"] for part in chosen["parts"]] == ["feature 7"]


def test_steer(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--feature", "3", "--alpha", "0", "--alpha", "6", "--text", TEXT, "--windows", "4", "--length", "32"]
    document = run(capsys, "sae", "steer", MODEL, str(trained), *options)
    still, moved = document["rows"]
    assert document["evidence"] == "causal"
    assert still["kl"] == pytest.approx(0, abs=1e-6)
    assert moved["kl"] > 0.001
    assert len(moved["promoted"]) == 10
    changes = [entry["change"] for entry in moved["promoted"]]
    assert changes == sorted(changes, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", MODEL, "--site", "L9.mlp_out", "--latents", "8", "--k", "2", "--out", "x"], "layers 0 to 5"),
        (["train", MODEL, "--site", "mlp", "--latents", "8", "--k", "2", "--out", "x"], "'mlp' is not a site"),
        (["train", MODEL, "--site", "L0.mlp_out", "--latents", "2", "--k", "3", "--out", "x"], "k is 3"),
        (["score", MODEL, "nothing"], "nothing is no SAE"),
        (["steer", MODEL, "SAE", "--feature", "256"], "feature 256 does not exist"),
        (["features", MODEL, "SAE", "--site", "L1.neurons", "--out", "x"], "reads 256 numbers per token"),
    ],
)
def test_bad_input_is_one_screen(
    arguments: list[str], message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert invoke(["sae", *(str(trained) if word == "SAE" else word for word in arguments), "--quiet"]) in (1, 2)
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert "\nnext:  " in err
    assert message in err
    assert "Traceback" not in err


LABELLED = ["--text", TEXT, "--windows", "80", "--length", "32"]


def test_explain_then_labels(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "labels"
    options = [MODEL, str(trained), "--out", str(out), *LABELLED]
    document = run(capsys, "sae", "explain", *options, "--count", "3", "--shown", "4")
    path = out / "prompts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["feature"] for row in rows] == document["features"]
    assert all(row["label"] == "" and "<<" in row["prompt"] and "\n4. " in row["prompt"] for row in rows)
    judged = ["--labels", str(path), "--judge", MODEL, "--texts", "3"]
    capsys.readouterr()
    assert invoke(["sae", "labels", *options, *judged, "--quiet"]) == 1
    assert "0 labels of features" in capsys.readouterr().err

    for number, row in enumerate(rows):
        row["label"] = f"label {number}"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    document = run(capsys, "sae", "labels", *options, *judged)
    assert document == json.loads((out / "labels.json").read_text())
    assert (document["status"], document["evidence"]) == ("unproven", "correlational")
    told = document["labels"]
    assert len(told) + len(document["left_out"]) == 3
    assert all(0 <= row[key] <= 1 for row in told for key in ("accuracy", "control"))
    assert invoke(["sae", "labels", *options, *judged, "--quiet"]) == 0
    assert "label (unproven)" in capsys.readouterr().out
    # Other windows could be those that the prompts showed.
    assert invoke(["sae", "labels", *options, *judged, "--seed", "1", "--quiet"]) == 2
    assert "its prompt was drawn from other windows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a label"),
        ('{"feature": 3}', "KeyError('label')"),
        ('{"feature": "3", "label": "x"}', "feature must be a number"),
        ('{"feature": 3, "label": "x"}\n{"feature": 3, "label": "y"}', "labels.jsonl:2: feature 3 has a label already"),
        ('{"feature": 256, "label": "x"}', "feature 256 does not exist"),
    ],
)
def test_faulty_labels(
    line: str, message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels.jsonl").write_text(line)
    options = ["--labels", str(tmp_path / "labels.jsonl"), "--judge", MODEL, "--out", str(tmp_path), *LABELLED]
    assert invoke(["sae", "labels", MODEL, str(trained), *options, "--quiet"]) == 2
    assert message in capsys.readouterr().err


def test_the_judge_reads_each_prompt_by_itself() -> None:
    """Prompts of different lengths in one batch, against one forward pass for each."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = ["Is it late? Answer:", "Once upon a time there was a boat on the river. Is it so? Answer:", "Answer:"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    yes, no = (tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in ("Yes", "No"))
    expected = []
    for prompt in prompts:
        with torch.no_grad():
            last = model(torch.tensor([tokenizer.encode(prompt)])).logits[0, -1].float()
        expected.append(float(last[yes] - last[no]))
    assert open_judge(MODEL, device="cpu")(prompts) == pytest.approx(expected, abs=0.05)
