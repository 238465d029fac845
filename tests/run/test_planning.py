"""Planning again from saved prices: budgets, protection, and what is refused before any work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from circuitpress.console import Console
from circuitpress.errors import CircuitpressError, InfeasibleBudget, RecipeError
from circuitpress.recipe import Recipe
from circuitpress.run import replan, run_recipe

MakeRecipe = Callable[..., Recipe]
Digests = Callable[[Path], dict[str, str]]
Forbid = Callable[..., None]


def test_another_budget_is_planned_from_saved_prices(
    recipe: Recipe, finished: Path, copy: Path, console: Console, digests: Digests, forbid: Forbid
) -> None:
    forbid("price.price", "probe.exact", "probe.probe")
    text, document = replan(copy, console, budget="6bpw", target=None, protect=(), front=True)
    assert 5 < document["bits_per_weight"] <= 6
    assert document["pareto"]
    assert "Pareto front" in text
    assert not (copy / "model").exists()
    assert not (copy / "evaluate").exists()
    _, result = run_recipe(recipe.replace({"plan.budget": "6bpw"}), copy, console)
    assert result["bits_per_weight"] == pytest.approx(document["bits_per_weight"])
    # And back: the same bytes as in the first place.
    replan(copy, console, budget="5bpw", target=None, protect=(), front=False)
    run_recipe(recipe, copy, console)
    assert digests(copy / "model") == digests(finished / "model")


def test_the_same_plan_again_keeps_the_model(copy: Path, console: Console, digests: Digests) -> None:
    before = digests(copy / "model")
    replan(copy, console, budget=None, target=None, protect=(), front=False)
    assert digests(copy / "model") == before


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("L1.head.4", {"L1.head.4"}),
        ("L2.kv_group.*", {"L2.kv_group.0", "L2.kv_group.1", "L2.kv_group.2"}),
        ("L0.neuron.51", {"L0.neuron.51"}),
        ("L0", set()),
        ("*.down_proj", set()),
    ],
)
def test_protected_parts_stay_as_they_were(copy: Path, pattern: str, named: set[str], console: Console) -> None:
    _, plan = replan(copy, console, budget="14bpw", target=None, protect=[pattern], front=False)
    kept = [decision for decision in plan["decisions"] if decision["protected"]]
    assert kept
    assert {decision["format"] for decision in kept} == {"float32"}
    assert {unit for decision in kept for unit in decision["units"]} == named
    assert plan["bits_per_weight"] <= 14


@pytest.mark.parametrize("pattern", ["L7.head.0", "L0.head.6", "L0.expert.0", "nothing"])
def test_protecting_what_does_not_exist_changes_nothing(
    copy: Path, pattern: str, console: Console, digests: Digests
) -> None:
    before = (copy / "plan.json").read_bytes(), (copy / "recipe.yaml").read_bytes(), digests(copy / "model")
    with pytest.raises(RecipeError, match="plan.protect"):
        replan(copy, console, budget=None, target=None, protect=[pattern], front=False)
    assert before == ((copy / "plan.json").read_bytes(), (copy / "recipe.yaml").read_bytes(), digests(copy / "model"))


def test_an_impossible_budget_says_the_smallest_and_changes_nothing(
    copy: Path, console: Console, digests: Digests
) -> None:
    before = (copy / "plan.json").read_bytes(), (copy / "manifest.json").read_bytes(), digests(copy / "model")
    with pytest.raises(InfeasibleBudget) as caught:
        replan(copy, console, budget="1bpw", target=None, protect=(), front=False)
    assert caught.value.smallest_bits > 1
    assert before == ((copy / "plan.json").read_bytes(), (copy / "manifest.json").read_bytes(), digests(copy / "model"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"plan.budget": "2.4bpw"}, InfeasibleBudget, "the smallest plan takes"),
        ({"plan.budget": "20kB"}, InfeasibleBudget, "20kB for all weight files"),
        ({"plan.budget": "5bpw", "plan.protect": ["*"]}, InfeasibleBudget, "protect"),
        ({"plan.protect": ["L9"]}, RecipeError, "plan.protect: 'L9' matches no unit"),
        ({"plan.protect": ["L0.head.6"]}, RecipeError, "plan.protect: L0.head.6 does not exist"),
        ({"plan.floors": {9: 4}}, RecipeError, "layer 9 does not exist"),
    ],
)
def test_what_cannot_be_planned_is_said_before_any_work_and_then_corrected(
    tiny_llama: Path,
    text_file: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[CircuitpressError],
    message: str,
    console: Console,
    make_recipe: MakeRecipe,
    forbid: Forbid,
) -> None:
    forbid()
    with pytest.raises(error, match=message.replace("*", r"\*")):
        run_recipe(make_recipe(tiny_llama, text_file, **changes), tmp_path / "run", console)
    # The same folder takes a corrected recipe: nothing was computed that could be lost.
    with pytest.raises(AssertionError, match="price.price ran"):
        run_recipe(make_recipe(tiny_llama, text_file), tmp_path / "run", console)


def test_another_target_needs_other_prices(copy: Path, console: Console) -> None:
    with pytest.raises(RecipeError) as caught:
        replan(copy, console, budget=None, target="bitsandbytes", protect=(), front=False)
    assert caught.value.hint is not None and "--set plan.target=bitsandbytes" in caught.value.hint
