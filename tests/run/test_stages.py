"""A whole run on a tiny model: what it leaves, resuming at every stage, bad checkpoints and texts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from circuitpress.console import Console
from circuitpress.errors import CheckpointError, CircuitpressError, QualityGateMissed, RecipeError
from circuitpress.evaluate.baselines import choose
from circuitpress.recipe import Recipe
from circuitpress.run import check_gates, measure_model, run_recipe, stages
from circuitpress.run.folder import clear, open_folder
from circuitpress.run.session import Session

MakeRecipe = Callable[..., Recipe]
Digests = Callable[[Path], dict[str, str]]
Forbid = Callable[..., None]


def test_a_run_leaves_every_file_and_stays_within_its_budget(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "recipe.yaml", "manifest.json", "run.log", "anatomy.json", "scores.safetensors", "scores.json", "report.html",
        "prices.safetensors", "prices.json", "probes.json", "exact.json", "plan.json", "pareto.json", "model",
    }  # fmt: skip
    assert "spill" not in names
    assert not list(finished.glob("**/*.partial*"))
    plan = json.loads((finished / "plan.json").read_text())
    fidelity = json.loads((finished / "evaluate" / "fidelity.json").read_text())
    assert fidelity["bits_per_weight"] == pytest.approx(plan["bits_per_weight"], rel=1e-12)
    assert fidelity["linear_bytes"] == plan["linear_bytes"] <= 5 * plan["linear_numel"] / 8
    assert plan["predicted_kl_corrected"] > 0
    probes = json.loads((finished / "probes.json").read_text())
    assert [probe["label"] for probe in probes] == ["uniform int3g16", "uniform int8g16"]
    assert {decision["format"] for decision in plan["decisions"]} <= {"int2g16", "int4g16", "int8g16", "float32"}
    exact = json.loads((finished / "exact.json").read_text())
    assert len(exact["rows"]) == round(0.05 * 2 * 21)
    front = json.loads((finished / "pareto.json").read_text())
    assert len({row["linear_bytes"] for row in front}) == len(front) > 5
    log = (finished / "run.log").read_text()
    assert "apply: started" in log
    assert "DEBUG" in log


def test_texts_of_the_stages_are_disjoint(recipe: Recipe, copy: Path, console: Console) -> None:
    from circuitpress.run.session import Session

    with open_folder(copy, create=False) as folder:
        parts = Session(folder, recipe, console).windows
    rows = [{tuple(row) for row in part.ids.tolist()} for part in parts]
    assert [len(part) for part in rows] == [6, 3, 3]
    assert len(set.union(*rows)) == 12
    provenance = json.loads((copy / "prices.json").read_text())["provenance"]
    assert provenance["calibration"]["ids_sha256"] == parts[0].ids_sha256


def test_a_finished_run_is_read_back_without_any_work(
    recipe: Recipe, copy: Path, console: Console, forbid: Forbid
) -> None:
    forbid()
    forbid("stream.open_stream", "report.write_report")
    text, document = run_recipe(recipe, copy, console)
    assert max(len(line) for line in text.splitlines() if str(copy) not in line) <= 80
    keys = {"kl", "perplexity", "reference_perplexity", "top1_agreement", "bytes", "linear_bytes", "bits_per_weight"}
    keys |= {"tokens", "seconds", "predicted_kl", "predicted_kl_corrected", "report", "model_folder", "reference_bytes"}
    assert keys <= set(document)
    assert list(document["stages"]) == list(stages.NAMES)


@pytest.mark.parametrize("stage", ["score", "exact", "probe", "swap", "apply", "evaluate", "report"])
def test_an_interrupted_run_goes_on_and_ends_the_same(
    recipe: Recipe, finished: Path, tmp_path: Path, stage: str, console: Console, digests: Digests, forbid: Forbid
) -> None:
    """The run is stopped inside `stage`, after everything before it; what was finished does not run again."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    later = stages.NAMES[stages.NAMES.index(stage) :]
    with open_folder(out, create=False) as folder:
        folder.forget(*later)
    clear(out, [name for entry in stages.STAGES if entry.name in later for name in entry.files])
    if "apply" in later:
        clear(out, ["model"])
    if stage == "score":  # half of the blocks are priced
        (out / "pricing" / "block-00000.safetensors").unlink()
    work = {"score": "price.price", "exact": "probe.exact", "probe": "probe.probe", "apply": "apply.apply"}
    before = [name for key, name in (work | {"evaluate": "evaluate.fidelity"}).items() if key not in later]
    for name in before:
        forbid(name)
    run_recipe(recipe, out, console)
    for name in ("plan.json", "probes.json", "prices.safetensors"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    assert digests(out / "model") == digests(finished / "model")


def test_quality_gates(recipe: Recipe) -> None:
    fidelity = {"kl": 0.1, "top1_agreement": 0.9}
    check_gates(recipe.replace({"evaluate.max_kl": 0.2, "evaluate.min_top1": 0.5}), fidelity)
    with pytest.raises(QualityGateMissed, match="max_kl is 0.05\ntop-1 agreement is 0.9000") as caught:
        check_gates(recipe.replace({"evaluate.max_kl": 0.05, "evaluate.min_top1": 0.95}), fidelity)
    assert caught.value.exit_code == 4
    with pytest.raises(QualityGateMissed):
        check_gates(recipe.replace({"evaluate.max_kl": 0.05}), {"kl": float("nan"), "top1_agreement": 1.0})


def test_eval_of_a_runs_model_is_the_runs_evaluation(
    copy: Path, tiny_llama: Path, text_file: Path, console: Console
) -> None:
    kept = json.loads((copy / "evaluate" / "fidelity.json").read_text())
    with open_folder(copy, create=False) as folder:
        folder.forget("evaluate")
    clear(copy, ["evaluate"])
    _, document = measure_model(copy / "model", console)
    assert document["kl"] == pytest.approx(kept["kl"], rel=1e-12)
    text, other = measure_model(
        copy / "model", console, reference=str(tiny_llama), text=text_file, windows=2, length=10, device="cpu"
    )
    assert other["tokens"] == 20
    assert other["kl"] != document["kl"]
    assert "against" in text
    assert json.loads((copy / "evaluate" / "fidelity.json").read_text())["tokens"] == kept["tokens"]
    _, itself = measure_model(tiny_llama, console, reference=str(tiny_llama), text=text_file, windows=2, length=10)
    assert itself["kl"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(RecipeError, match="original is unknown"):
        measure_model(tiny_llama, console)


def damage(name: str, folder: Path) -> None:
    file = folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text())
    if name == "no config":
        (folder / "config.json").unlink()
    elif name == "truncated":
        file.write_bytes(file.read_bytes()[:-7])
    elif name == "quantized":
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    elif name == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif name == "nan":
        from safetensors.torch import load_file, save_file

        tensors = load_file(file)
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no config", "has no config.json"),
        ("truncated", "is truncated"),
        ("quantized", r"is already quantized \(gptq\)"),
        ("no tokenizer", "the tokenizer cannot be loaded"),
        ("nan", "tensor model.layers.1.mlp.up_proj.weight holds 1 NaN or infinite values"),
    ],
)
def test_bad_checkpoints(
    tiny_llama: Path,
    text_file: Path,
    tmp_path: Path,
    name: str,
    message: str,
    console: Console,
    make_recipe: MakeRecipe,
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    damage(name, folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        run_recipe(make_recipe(folder, text_file), tmp_path / "run", console)
    assert caught.value.hint
    assert not (tmp_path / "run" / "model").exists()


def test_a_text_shorter_than_a_window(
    tiny_llama: Path, tmp_path: Path, console: Console, make_recipe: MakeRecipe
) -> None:
    (tmp_path / "short.txt").write_text("the boat")
    with pytest.raises(CircuitpressError, match=r"short.txt has \d+ tokens, one window needs 24"):
        run_recipe(make_recipe(tiny_llama, tmp_path / "short.txt"), tmp_path / "run", console)


def test_windows_are_no_longer_than_the_model_reads(
    tiny_llama: Path, text_file: Path, tmp_path: Path, console: Console, make_recipe: MakeRecipe
) -> None:
    from circuitpress.run.session import Session

    recipe = make_recipe(tiny_llama, text_file, **{"data.length": 500})
    with open_folder(tmp_path / "run", create=True) as folder:
        assert Session(folder, recipe, console).windows[0].ids.shape == (6, 64)


def test_a_misspelt_task_is_told_before_anything_is_computed(
    make_recipe: MakeRecipe, tiny_llama: Path, text_file: Path, tmp_path: Path, console: Console,
    forbid: Callable[..., None],
) -> None:  # fmt: skip
    forbid()
    (tmp_path / "tasks").mkdir()
    asked = {"evaluate.tasks": ["no_such_task_anywhere"], "evaluate.include": str(tmp_path / "tasks")}
    with pytest.raises(CircuitpressError, match="no task called no_such_task_anywhere"):
        run_recipe(make_recipe(tiny_llama, text_file, **asked), tmp_path / "run", console)


def test_tasks_of_a_recipe_are_run_on_both_models_and_gated(
    make_recipe: MakeRecipe, tiny_llama: Path, text_file: Path, tmp_path: Path, console: Console
) -> None:
    rows = [{"good": "the river runs", "bad": "runs river the"}, {"good": "a good day", "bad": "day good a"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = "task: pairs\ndataset_path: json\ndataset_kwargs: {data_files: {test: pairs.jsonl}}\ntest_split: test\n"
    task += 'output_type: multiple_choice\ndoc_to_text: ""\ndoc_to_target: 0\ndoc_to_choice: "{{[good, bad]}}"\n'
    (tmp_path / "pairs.yaml").write_text(task + "metric_list: [{metric: acc, aggregation: mean}]\n")
    asked = {"evaluate.tasks": ["pairs"], "evaluate.include": str(tmp_path), "evaluate.task_data": str(tmp_path)}
    recipe = make_recipe(tiny_llama, text_file, **asked, **{"evaluate.min_recovery": 1.5})
    text, document = run_recipe(recipe, tmp_path / "run", console)
    (row,) = document["tasks"]
    assert (row["task"], row["metric"], row["documents"]) == ("pairs", "acc", 2) and "pairs acc" in text
    if document["recovery"] is None:
        assert row["reference"] == 0
    else:
        with pytest.raises(QualityGateMissed, match="of the task scores is left"):
            check_gates(recipe, document)
    plain = measure_model(tmp_path / "run" / "model", console, windows=2, length=16, baselines=choose(["nf4"], {}))[1]
    assert 4 < plain["baselines"]["nf4"]["bits_per_weight"] < 6.5


@pytest.mark.parametrize(
    ("dtype", "fast", "expected"),
    [("auto", True, "bfloat16"), ("auto", False, "float32"), ("float32", True, "float32")],
)
def test_gradients_are_taken_in_bfloat16_where_that_is_fast(
    dtype: str, fast: bool, expected: str, make_recipe: MakeRecipe, tiny_llama: Path, text_file: Path, tmp_path: Path,
    console: Console, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What is measured stays in float32."""
    monkeypatch.setattr("circuitpress.stream.has_fast_bfloat16", lambda _: fast)
    recipe = make_recipe(tiny_llama, text_file, **{"run.dtype": dtype})
    with open_folder(tmp_path / "run", create=True) as folder:
        session = Session(folder, recipe, console)
        assert (str(session.scoring.dtype), str(session.stream.dtype)) == (f"torch.{expected}", "torch.float32")
