"""Recipes: every problem at once with its key and value, paths from the recipe's folder, overrides, round trip."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from circuitpress.errors import RecipeError
from circuitpress.menu import MENU, TARGET_MENUS, refuse_formats
from circuitpress.recipe import Recipe, describe_changes, json_schema, known_keys

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a checkpoint folder `model` and a text."""
    (tmp_path / "model").mkdir()
    (tmp_path / "text.txt").write_text("some text\n")
    return tmp_path


def parse(text: str, folder: Path, *overrides: str) -> Recipe:
    return Recipe.parse(text, name="recipe.yaml", folder=folder, overrides=overrides)


def problems(text: str, folder: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse(text, folder, *overrides)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    return [problem.removeprefix("recipe.yaml: ") for problem in caught.value.problems]


def test_one_line_is_a_recipe(folder: Path) -> None:
    recipe = parse("model: model", folder)
    assert recipe.model == str(folder / "model")
    assert recipe.plan.budget == "3.0bpw"
    assert recipe.data.calibration is None
    assert recipe.score.exact == 0.1


def test_paths_start_at_the_recipes_folder_whatever_the_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    (folder / "recipe.yaml").write_text("model: model\ndata: {test: text.txt}\n")
    assert Recipe.load(folder / "recipe.yaml").data.test == folder / "text.txt"


def test_what_is_no_folder_but_looks_like_one_on_the_hub_is_left_alone(folder: Path) -> None:
    assert parse("model: user/name@main", folder).model == "user/name@main"
    assert problems("model: ./nothing", folder) == [f"model: no such folder: {folder}/nothing"]


def test_every_problem_is_reported_at_once(folder: Path) -> None:
    found = problems(
        """
        plan: {bugdet: 3.0bpw, budget: 3 bits, formats: [int4, int9]}
        score: {exact: 2}
        data: {calibration: nothing.txt}
        frobnicate: 1
        """,
        folder,
        "evaluate.windows",
    )
    assert "--set evaluate.windows: expected key=value" in found[0]
    expected = {
        "model: required",
        "plan.bugdet: unknown key; did you mean plan.budget?",
        "frobnicate: unknown key",
        f"data.calibration: no such file: {folder}/nothing.txt",
        "score.exact: input should be less than or equal to 1 (found 2)",
    }
    assert expected <= set(found)
    assert [line for line in found if line.startswith("plan.budget: not a budget")][0].endswith("(found '3 bits')")
    assert [line for line in found if line.startswith("plan.formats.1: not a format")][0].endswith("(found 'int9')")
    assert len(found) == 8


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("plan.bugdet", "plan.budget"),
        ("budget", "plan.budget"),
        ("quantise.x", "quantize"),
        ("data.lenght", "data.length"),
    ],
)
def test_an_unknown_key_names_the_nearest(folder: Path, key: str, nearest: str) -> None:
    (line,) = problems("model: model", folder, f"{key}=1")
    assert line.endswith(f"did you mean {nearest}?")


@pytest.mark.parametrize("budget", ["3", "0bpw", "-1bpw", "3 bpws", "abc", "40 percent", "[3bpw]", "null"])
def test_a_budget_needs_a_number_and_a_unit(folder: Path, budget: str) -> None:
    (line,) = problems("model: model", folder, f"plan.budget={budget}")
    assert line.startswith("plan.budget: not a budget: write bits per weight")


@pytest.mark.parametrize("budget", ["3.0bpw", ".5bpw", "40%", "900MB", "1.2GB", "800 MiB"])
def test_budgets(folder: Path, budget: str) -> None:
    assert parse("model: model", folder, f"plan.budget={budget}").plan.budget == budget


@pytest.mark.parametrize("name", ["code4g64", "trellis3", "int4g64s6", "int4+0.5%", "drop", "int9"])
def test_embedding_and_lm_head_take_plain_formats(folder: Path, name: str) -> None:
    (line,) = problems("model: model", folder, f"plan.outer={name}")
    assert line.startswith("plan.outer: not for embedding and lm_head: they take auto, int2 to int8")
    for fine in ("auto", "int4g32", "dense"):
        assert parse("model: model", folder, f"plan.outer={fine}").plan.outer == fine


def test_recipe_and_planner_read_the_same_budgets() -> None:
    from circuitpress.fields import BUDGET
    from circuitpress.plan import budget

    assert budget.BUDGET is BUDGET


def test_overrides_are_yaml_and_make_sections(folder: Path) -> None:
    recipe = parse("model: model\ndata: {seed: 4}", folder, "data.samples=7", "plan.protect=[L0.head.1, L2]")
    assert (recipe.data.seed, recipe.data.samples) == (4, 7)
    assert recipe.plan.protect == ("L0.head.1", "L2")


def test_an_override_does_not_reach_into_a_value(folder: Path) -> None:
    assert problems("model: model", folder, "model.x=1")[0] == "--set model.x=1: model is 'model', not a section"


def test_a_key_that_appears_twice_is_an_error_with_its_line(folder: Path) -> None:
    (line,) = problems("model: model\nplan:\n  budget: 3bpw\n  budget: 4bpw\n", folder)
    assert line == "recipe.yaml:4:3: the key 'budget' appears twice, first in line 3\n    budget: 4bpw\n    ^"


def test_a_syntax_error_shows_the_line(folder: Path) -> None:
    (line,) = problems("model: model\nplan: {budget: 3bpw\ndata:\n", folder)
    assert line.startswith("recipe.yaml:3:5: ")
    assert "\n  data:\n      ^" in line


@pytest.mark.parametrize("text", ["", "- model", "model", "3"])
def test_a_recipe_is_a_mapping(folder: Path, text: str) -> None:
    assert problems(text, folder)[0].startswith("a recipe is a mapping of keys, found ")


def test_a_recipe_that_is_not_there_or_not_text(folder: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read the recipe .*nothing.yaml: No such file"):
        Recipe.load(folder / "nothing.yaml")
    (folder / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot read the recipe .*bytes.yaml"):
        Recipe.load(folder / "bytes.yaml")


def test_the_written_form_reads_back_the_same(folder: Path) -> None:
    recipe = parse(
        "model: model\ndata: {test: text.txt}\nevaluate: {max_kl: 1e-2}", folder, "plan.protect=['L0.head.*']"
    )
    assert Recipe.parse(recipe.to_yaml(), name="again", folder=Path("/")) == recipe
    assert recipe.replace({"plan.budget": "2bpw"}).plan.budget == "2bpw"
    assert recipe.replace({}) == recipe
    assert recipe.flatten()["evaluate.max_kl"] == 0.01


def test_changes_are_named(folder: Path) -> None:
    old = parse("model: model", folder)
    new = old.replace({"plan.budget": "2bpw", "plan.formats": ["int4"], "data.seed": 1})
    changes = describe_changes(old.flatten(), new.flatten(), ignore=["data.seed"])
    assert changes[0] == "plan.budget: '3.0bpw' -> '2bpw'"
    assert changes[1].startswith("plan.formats: ['int2g32', 'int2', ")
    assert len(changes) == 2


def test_every_key_is_documented_in_the_schema() -> None:
    schema = json_schema()
    sections = [schema, *schema["$defs"].values()]  # pyright: ignore
    for section in sections:
        for key, entry in section["properties"].items():  # pyright: ignore
            assert "description" in entry or "$ref" in entry, key
    assert {"model", "plan.budget", "schema", "data"} <= set(known_keys())


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_of_the_repository_are_valid(path: Path) -> None:
    recipe = Recipe.load(path)
    stated = yaml.safe_load(path.read_text())
    assert stated["schema"] == recipe.version


def test_reading_a_recipe_does_not_load_torch() -> None:
    code = "import circuitpress.recipe, circuitpress.console, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_target_brings_its_menu_and_refuses_what_it_cannot_hold(folder: Path) -> None:
    recipe = parse("model: model\nplan: {target: compressed-tensors}", folder)
    assert recipe.plan.formats == TARGET_MENUS["compressed-tensors"]
    assert parse(recipe.to_yaml(), folder) == recipe
    assert parse("model: model", folder, "plan.target=dense").plan.formats == MENU
    (found,) = problems("model: model\nplan: {target: bitsandbytes, formats: [int4, nf4, sym8c, drop]}", folder)
    assert found == "plan.formats: bitsandbytes cannot hold int4, sym8c: it takes nf4 or llmint8, and floating types"
    (found,) = problems("model: model\nplan: {target: bitsandbytes, formats: [nf4, llmint8]}", folder)
    assert "nf4 and llmint8 cannot be in one model" in found
    (found,) = problems("model: model\nplan: {target: gguf, granularity: unit, outer: int4}", folder)
    assert "one format a matrix" in found and "embedding and lm_head" in found
    (found,) = problems("model: model\nplan: {target: onnx}", folder)
    assert found.startswith("plan.target:")
    for lost in ("quantize: {correct: true}", "refine: {steps: 9}"):
        (found,) = problems(f"model: model\nplan: {{target: gguf}}\n{lost}", folder)
        assert "would be lost in gguf" in found
    for target, menu in TARGET_MENUS.items():
        assert refuse_formats(target, menu) == []
