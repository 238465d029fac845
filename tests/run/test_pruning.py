"""The prune stage: by fraction and by search, its budget, its resuming, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from circuitpress.anatomy import read_anatomy
from circuitpress.console import Console
from circuitpress.errors import InfeasibleBudget, RecipeError
from circuitpress.files import sha256
from circuitpress.recipe import Recipe
from circuitpress.run import pruning as pruning_stage
from circuitpress.run import run_recipe

MakeRecipe = Callable[..., Recipe]
QUICK = {"score.exact": 0, "plan.probes": [], "plan.swaps": 0}


def test_by_fraction_the_run_goes_on_with_a_smaller_model(
    tiny_llama: Path, text_file: Path, tmp_path: Path, console: Console, make_recipe: MakeRecipe
) -> None:
    asked = QUICK | {"prune.neurons": 0.25, "prune.kv_groups": 0.3, "plan.protect": ["L1.neuron.7", "L2.head.5"]}
    recipe = make_recipe(tiny_llama, text_file, **asked)
    _, document = run_recipe(recipe, tmp_path / "run", console)
    out = tmp_path / "run"
    pruned = json.loads((out / "prune.json").read_text())
    assert pruned["widths"] == {"neurons": 39, "kv_groups": 2}
    assert 7 in pruned["stay"]["1"]["neuron"]
    assert 2 in pruned["stay"]["2"]["kv_group"]
    original, model = read_anatomy(tiny_llama), read_anatomy(out / "model", packed_ok=True)
    assert model.linear_numel == original.linear_numel > model.present_numel
    plan = json.loads((out / "plan.json").read_text())
    assert plan["linear_numel"] == original.linear_numel
    assert document["linear_bytes"] == plan["linear_bytes"] <= 5 * original.linear_numel / 8
    assert document["bits_per_weight"] == pytest.approx(8 * plan["linear_bytes"] / original.linear_numel)
    assert document["reference_bytes"] == original.file_bytes
    assert plan["predicted_kl"] > pruned["kl"] > 0
    assert plan["provenance"]["pruned"]["neurons"] == 39
    moved = pruned["stay"]["1"]["neuron"].index(7)
    protected = {unit for entry in plan["decisions"] if entry["protected"] for unit in entry["units"]}
    assert f"L1.neuron.{moved}" in protected
    assert not (out / "pruning").exists()


def test_nothing_is_pruned_unless_asked(finished: Path) -> None:
    assert json.loads((finished / "prune.json").read_text())["widths"] is None
    assert not (finished / "pruned").exists()


@pytest.fixture(scope="module")
def searched(
    tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory, make_recipe: MakeRecipe
) -> tuple[Recipe, Path]:
    """A finished search at a budget where dropping alone is possible."""
    import io

    asked = QUICK | {"plan.formats": ["drop", "int2", "int4", "float16"], "plan.budget": "8bpw"}
    recipe, out = make_recipe(tiny_llama, text_file, **asked), tmp_path_factory.mktemp("search") / "run"
    run_recipe(recipe, out, Console(err=io.StringIO(), out=io.StringIO()))
    return recipe, out


def test_the_search_keeps_the_best_of_all_that_it_measured(searched: tuple[Recipe, Path], tiny_llama: Path) -> None:
    _, out = searched
    document = json.loads((out / "prune.json").read_text())
    candidates, numel = document["candidates"], read_anatomy(tiny_llama).linear_numel
    by_widths = {(entry["neurons"], entry["kv_groups"]): entry for entry in candidates}
    assert by_widths[52, 3]["kl"] is not None
    best = min((entry for entry in candidates if entry["kl"] is not None), key=lambda entry: entry["kl"])
    chosen = document["widths"] or {"neurons": 52, "kv_groups": 3}
    assert chosen == {"neurons": best["neurons"], "kv_groups": best["kv_groups"]}
    # A layer holds 48 x (3 neurons + 2 x 16 for q and o + 2 x 8 for k and v of every group). At 16 bits a weight,
    # dropping alone fits the budget in one of them.
    sizes = {(n, g): 3 * 48 * (3 * n + (2 * 16 + 2 * 8) * g) for n, g in by_widths}
    assert sizes[52, 3] == numel
    assert any(16 * size <= 8 * numel for size in sizes.values())
    plan = json.loads((out / "plan.json").read_text())
    assert plan["linear_bytes"] <= numel
    assert not (out / "pruning").exists()


def test_an_interrupted_search_goes_on_and_ends_the_same(
    searched: tuple[Recipe, Path], tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, finished = searched
    divergence, calls = pruning_stage._divergence, []

    def dies(*args: object) -> float:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return divergence(*args)  # pyright: ignore

    monkeypatch.setattr(pruning_stage, "_divergence", dies)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, out, console)
    assert not (out / "prune.json").exists()
    run_recipe(recipe, out, console)
    assert json.loads((out / "prune.json").read_text()) == json.loads((finished / "prune.json").read_text())
    for path in sorted((finished / "model").iterdir()):
        assert sha256(out / "model" / path.name) == sha256(path)


def test_what_is_refused(
    tiny_llama: Path, tiny_gpt2: Path, text_file: Path, tmp_path: Path, console: Console, make_recipe: MakeRecipe
) -> None:
    with pytest.raises(RecipeError, match="prune.heterogeneous: layers of different widths cannot be written"):
        make_recipe(tiny_llama, text_file, **{"prune.heterogeneous": True})
    with pytest.raises(RecipeError, match="prune: fractions are given, and drop"):
        make_recipe(tiny_llama, text_file, **{"prune.neurons": 0.1, "plan.formats": ["drop", "int4"]})
    with pytest.raises(RecipeError, match="drop alone is no format"):
        make_recipe(tiny_llama, text_file, **{"plan.formats": ["drop"]})
    with pytest.raises(RecipeError, match="the heads of a gpt2 cannot leave"):
        run_recipe(make_recipe(tiny_gpt2, text_file, **{"prune.kv_groups": 0.5}), tmp_path / "a", console)
    with pytest.raises(RecipeError, match="layer 1 would keep 26, and 52 are protected"):
        asked = {"prune.neurons": 0.5, "plan.protect": ["L1"]}
        run_recipe(make_recipe(tiny_llama, text_file, **asked), tmp_path / "b", console)
    with pytest.raises(InfeasibleBudget):
        asked = {"prune.neurons": 0.1, "plan.budget": "1bpw"}
        run_recipe(make_recipe(tiny_llama, text_file, **asked), tmp_path / "c", console)
    assert not (tmp_path / "c" / "pricing").exists()
