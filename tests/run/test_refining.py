"""The refine stage: what it leaves behind, what changes it, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from circuitpress.console import Console
from circuitpress.errors import CircuitpressError
from circuitpress.recipe import Recipe
from circuitpress.refine import RECORD
from circuitpress.run import refining, run_recipe

MakeRecipe = Callable[..., Recipe]
Digests = Callable[[Path], dict[str, str]]
Forbid = Callable[..., None]
STEPS = {"plan.budget": "4bpw", "plan.swaps": 0, "score.exact": 0.0, "refine.steps": 3, "refine.written": 4}


@pytest.fixture(scope="module")
def refined(
    make_recipe: MakeRecipe, tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, Path]:
    recipe = make_recipe(tiny_llama, text_file, **STEPS)
    out = tmp_path_factory.mktemp("refined") / "run"
    run_recipe(recipe, out, Console(quiet=True))
    return recipe, out


def test_a_run_records_what_refinement_did(refined: tuple[Recipe, Path]) -> None:
    _, out = refined
    record = json.loads((out / "refine.json").read_text())
    assert record["steps"] == 3
    assert record["tokens"] == (6 + 4) * 24
    assert record["kept"] == (record["kl_after"] < record["kl_before"])
    assert json.loads((out / "model" / RECORD).read_text()) == record


def test_a_model_that_a_killed_run_had_refined_is_not_refined_again(
    refined: tuple[Recipe, Path], tmp_path: Path, forbid: Forbid, digests: Digests
) -> None:
    recipe, out = refined
    copy = Path(shutil.copytree(out, tmp_path / "run"))
    (copy / "refine.json").unlink()
    before = digests(copy / "model")
    forbid("refine.distill.refine", "run.refining.refine", "apply.apply")
    run_recipe(recipe, copy, Console(quiet=True))
    assert digests(copy / "model") == before
    assert (copy / "refine.json").read_bytes() == (out / "refine.json").read_bytes()


def test_without_steps_the_codes_stay(finished: Path) -> None:
    assert json.loads((finished / "refine.json").read_text()) == {"steps": 0}
    assert not (finished / "model" / RECORD).exists()


def test_a_model_larger_than_memory_is_refused_before_any_work(
    refined: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digests: Digests
) -> None:
    recipe, out = refined
    copy = Path(shutil.copytree(out, tmp_path / "run"))
    for name in ("refine.json", f"model/{RECORD}"):
        (copy / name).unlink()
    before = digests(copy / "model")
    monkeypatch.setattr(refining, "memory", lambda *_: 10**15)
    with pytest.raises(CircuitpressError, match=r"1000000\.0 GB, this machine has .* GB"):
        run_recipe(recipe, copy, Console(quiet=True))
    assert digests(copy / "model") == before
