"""The swap stage on a tiny model, and budgets for all weight files, in whole runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from circuitpress.console import Console
from circuitpress.plan import Swaps
from circuitpress.recipe import Recipe
from circuitpress.run import replan, run_recipe
from circuitpress.units import Plan

MakeRecipe = Callable[..., Recipe]
Digests = Callable[[Path], dict[str, str]]


def test_swaps_are_written_down_and_stay_within_the_budget(finished: Path) -> None:
    document = json.loads((finished / "swaps.json").read_text())
    assert 4 <= document["measured"] <= 12
    assert 0 < document["kl"] <= document["start_kl"]
    assert len(document["rounds"]) >= 1
    plan = Plan.load(finished / "plan.json")
    assert plan.bits_per_weight <= 5


def test_a_better_plan_takes_the_place_of_the_solvers(
    recipe: Recipe, copy: Path, console: Console, digests: Digests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever `improve` returns is what is applied; planning the same again keeps it."""
    replan(copy, console, budget="5.5bpw", target=None, protect=(), front=False)
    before = Plan.load(copy / "plan.json")

    def improve(prices, constraints, start, explore, confirm, *, most):
        choice = np.where(prices.is_linear, prices.formats.index("int4g16"), start)
        found = [measure([start, choice]) for measure in (explore, confirm)]
        assert [[kl.shape for kl in pair] for pair in found] == [[(2,), (2,)], [(1,), (1,)]]
        assert not np.isin(found[0][0], found[1][0]).any()
        assert most == 12
        assert constraints[0].name == "budget"
        return Swaps(choice, 0.02, 0.01, 2, (len(start), 0))

    monkeypatch.setattr("circuitpress.run.swapping.improve", improve)
    changed = recipe.replace({"plan.budget": "5.5bpw"})
    run_recipe(changed, copy, console)
    after = Plan.load(copy / "plan.json")
    assert {decision.format for decision in after.decisions} == {"int4g16"}
    assert after.predicted_kl == pytest.approx(sum(decision.nats for decision in after.decisions))
    assert before.predicted_kl_corrected is not None
    # Measured to be half of the KL: so is the prediction.
    assert after.predicted_kl_corrected == pytest.approx(before.predicted_kl_corrected / 2)
    assert after.provenance["swaps"] == {"measured": 2, "start_kl": 0.02, "kl": 0.01}
    model = digests(copy / "model")
    replan(copy, console, budget=None, target=None, protect=(), front=False)
    assert digests(copy / "model") == model
    assert Plan.load(copy / "plan.json") == after


def test_without_swaps_the_plan_is_the_solvers(
    recipe: Recipe, finished: Path, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setattr("circuitpress.run.swapping.improve", lambda *_, **__: pytest.fail("measured"))
    replan(tmp_path / "run", console, budget="6bpw", target=None, protect=(), front=False)
    plan = Plan.load(tmp_path / "run" / "plan.json")
    changed = recipe.replace({"plan.budget": "6bpw", "plan.swaps": 0})
    for name in ("recipe.yaml", "manifest.json"):
        path = tmp_path / "run" / name
        text = (
            path.read_text()
            .replace("swaps: 12", "swaps: 0")
            .replace('"recipe.plan.swaps": 12', '"recipe.plan.swaps": 0')
        )
        path.write_text(text)
    run_recipe(changed, tmp_path / "run", console)
    assert Plan.load(tmp_path / "run" / "plan.json") == plan
    assert json.loads((tmp_path / "run" / "swaps.json").read_text())["measured"] == 0


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen2"])
def test_a_budget_for_files_packs_embedding_and_lm_head(
    name: str, text_file: Path, tmp_path: Path, console: Console, make_recipe: MakeRecipe,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    folder = request.getfixturevalue(name)
    small = {"tiny_llama": 40_000, "tiny_qwen2": 21_000}[name]
    recipe = make_recipe(folder, text_file, **{"plan.budget": f"{small}B", "plan.swaps": 4, "score.exact": 0.0})
    _, result = run_recipe(recipe, tmp_path / "run", console)
    plan = Plan.load(tmp_path / "run" / "plan.json")
    assert result["bytes"] <= small
    assert result["bytes"] <= plan.linear_bytes + plan.other_bytes
    assert any(decision.format.startswith("int") for decision in plan.outer)
    fidelity = json.loads((tmp_path / "run" / "evaluate" / "fidelity.json").read_text())
    assert fidelity["linear_bytes"] == plan.linear_bytes
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    with torch.no_grad():
        assert model(torch.arange(9)[None]).logits.isfinite().all()


def test_a_named_format_is_used_whatever_the_budget_counts(
    tiny_llama: Path, text_file: Path, tmp_path: Path, console: Console, make_recipe: MakeRecipe
) -> None:
    recipe = make_recipe(tiny_llama, text_file, **{"plan.outer": "int6", "plan.swaps": 0, "score.exact": 0.0})
    run_recipe(recipe, tmp_path / "run", console)
    plan = Plan.load(tmp_path / "run" / "plan.json")
    assert [decision.format for decision in plan.outer] == ["int6g16", "int6g16"]
    assert plan.bits_per_weight <= 5
