"""The `sae` commands end to end on the demo checkpoint: train, score, features, steer; errors on one screen."""

import json
from pathlib import Path

import pytest

from circuitpress.cli import invoke

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
