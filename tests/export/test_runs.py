"""From a recipe with a target to the export, through the command line."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from circuitpress.anatomy import read_anatomy
from circuitpress.cli import invoke
from circuitpress.console import Console
from circuitpress.export.gguf import commands, read_imatrix
from circuitpress.price import has_hessians
from circuitpress.recipe import Recipe
from circuitpress.run.exporting import _diagonals
from circuitpress.run.folder import open_folder
from circuitpress.run.session import Session
from circuitpress.units import Plan

SETTINGS = ["data.samples=4", "data.length=24", "evaluate.windows=2", "plan.probes=[]", "plan.swaps=0", "score.exact=0"]


def run(model: Path, text: Path, out: Path, *changes: str) -> int:
    recipe = out.with_suffix(".yaml")
    recipe.write_text(f"model: {model}\ndata: {{calibration: {text}}}\nrun: {{device: cpu}}\n")
    settings = [flag for change in (*SETTINGS, *changes) for flag in ("--set", change)]
    return invoke(["run", str(recipe), "--out", str(out), "--quiet", *settings])


def test_a_plan_for_vllm_has_one_format_for_fused_matrices(
    llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    protect = "plan.protect=[L1.head.3]"
    changes = ["plan.target=compressed-tensors", "plan.budget=10bpw", protect, "prune.neurons=0.25"]
    assert run(llama, text_file, tmp_path / "run", *changes) == 0
    plan = Plan.load(tmp_path / "run" / "plan.json")
    assert plan.target == "compressed-tensors"
    formats = {group.name.rpartition(".")[2] for group in (decision.group for decision in plan.decisions)}
    assert formats == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    kept = {decision.group.name: decision.format for decision in plan.decisions if decision.protected}
    best = {"model.layers.1.self_attn.qkv_proj": "float32", "model.layers.1.self_attn.o_proj": "float32"}
    assert kept == best
    capsys.readouterr()
    out = tmp_path / "out"
    assert invoke(["export", str(tmp_path / "run" / "model"), "--format", "compressed-tensors", "--out", str(out)]) == 0
    assert "loaded in a fresh process" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama" and config["intermediate_size"] == 96  # a plain Llama, a quarter narrower
    written = json.loads((out / "export.json").read_text())["bytes"]
    stored = sum(decision.nbytes for decision in plan.decisions) + plan.other_bytes
    assert written == pytest.approx(stored, rel=0.1)  # headers and the lists of words are most of the difference
    assert invoke(["export", str(tmp_path / "run" / "model"), "--format", "gguf", "--out", str(tmp_path / "no")]) == 2
    assert invoke(["plan", str(tmp_path / "run"), "--target", "gguf"]) == 2
    assert (
        "plan.target: weights are not rounded for gguf as they were for compressed-tensors" in capsys.readouterr().err
    )


def test_gguf_takes_types_importance_and_the_unrounded_model(
    llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    menu = "plan.formats=[int4g32,int5g32,sym8g32,dense]"
    assert run(llama, text_file, tmp_path / "run", "plan.target=gguf", "plan.budget=6bpw", menu) == 0
    shown = capsys.readouterr().out
    out = tmp_path / "out"
    command = ["export", str(tmp_path / "run" / "model"), "--format", "gguf", "--out", str(out)]
    assert invoke([*command, "--dtype", "float16"]) == 2
    assert invoke([*command, "--dry-run"]) == 0 and not out.exists()
    capsys.readouterr()
    assert invoke([*command, "--json"]) == 0
    convert, quantize = (shlex.split(line) for line in json.loads(capsys.readouterr().out)["commands"])
    document = json.loads((out / "export.json").read_text())
    assert document["check"]["max_logit_error"] == 0
    assert str(tmp_path) not in json.dumps(document).replace(document["source"], "")  # it may be pushed
    plan = Plan.load(tmp_path / "run" / "plan.json")
    assert document["linear_bytes"] == plan.linear_bytes
    assert plan.bits_per_weight <= 6
    stored = json.loads((tmp_path / "run" / "evaluate" / "fidelity.json").read_text())
    assert stored["bits_per_weight"] != pytest.approx(plan.bits_per_weight, abs=1e-3)  # of the stand-ins
    (bits,) = [line.split() for line in shown.splitlines() if line.startswith("bits per weight")]
    assert bits[-2:] == [f"{stored['bits_per_weight']:.3f}", f"{8 * document['linear_bytes'] / plan.linear_numel:.3f}"]
    assert "before after in llama.cpp" in " ".join(shown.split()) and "stand in for them" in shown
    (types,) = [line for line in shown.splitlines() if line.startswith("types: ")]
    assert all(f"{name} " in types for name in set(document["types"].values()))
    assert set(document["types"].values()) <= {"iq4_nl", "q5_0", "q8_0", "f32"}
    assert len((out / "tensor-types.txt").read_text().splitlines()) == 14
    assert convert[:2] == ["python", "-c"] and "'gpt-2'" in convert[2]  # the test's own byte-level tokenizer
    assert convert[3:] == [str(out), "--outfile", f"{out}/model-unrounded.gguf", "--outtype", "f32"]
    assert quantize[quantize.index("--token-embedding-type") + 1] == "f32"
    assert all(Path(path).is_file() for path in quantize if path.endswith(("txt", "imatrix.gguf")))
    assert quantize[-3:] == [convert[5], f"{out}/model.gguf", "Q4_K_M"]
    weights = read_imatrix(out / "imatrix.gguf")
    assert all(float(values.std()) > 0 and abs(float(values.mean()) - 1) < 1e-3 for values in weights.values())
    capsys.readouterr()
    assert invoke(["plan", str(tmp_path / "run"), "--target", "dense"]) == 2  # prices are those of nearest codes
    assert "--set plan.target=dense" in capsys.readouterr().err
    shutil.move(tmp_path / "run" / "model", tmp_path / "model")
    assert invoke(["export", str(tmp_path / "model"), "--format", "gguf", "--out", str(tmp_path / "other")]) == 1


def test_a_tokenizer_that_llama_cpp_knows_is_left_to_it(llama: Path, tmp_path: Path) -> None:
    """One with a splitting rule of its own, as Llama 3 has, and one from SentencePiece, which splits nothing."""
    for split in ({"type": "Sequence", "pretokenizers": []}, {"type": "ByteLevel", "use_regex": False}, None):
        folder = tmp_path / "a model"
        shutil.copytree(llama, folder, dirs_exist_ok=True)
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"pre_tokenizer": split}))
        convert, _ = commands(read_anatomy(folder), tmp_path / "an export")
        assert shlex.split(convert)[:3] == ["python", "convert_hf_to_gguf.py", f"{tmp_path}/an export"]


def test_importance_of_a_large_model_takes_a_walk(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name, kept in (("kept", 1 << 30), ("walk", 0)):
        monkeypatch.setattr("circuitpress.price.KEPT_HESSIANS", kept)
        assert (
            run(
                llama,
                text_file,
                tmp_path / name,
                "plan.target=gguf",
                "plan.formats=[sym8g32]",
                "plan.budget=9bpw",
                "run.dtype=float32",  # Hessians that are kept come from the walk of gradients, which may be in bfloat16
            )
            == 0  # fmt: skip
        )
        assert has_hessians(tmp_path / name / "pricing") == bool(kept)
        with open_folder(tmp_path / name, create=False) as folder:
            session = Session(folder, Recipe.load(tmp_path / name / "recipe.yaml"), Console(quiet=True))
            found.append(_diagonals(session))
    assert found[0].keys() == found[1].keys() and len(found[0]) == 14
    for name, values in found[0].items():
        np.testing.assert_allclose(found[1][name], values, rtol=1e-4)
