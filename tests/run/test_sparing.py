"""A recipe that spares features: their Hessians change the rounding, and the SAE belongs to what a run is made from."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from circuitpress.console import Console
from circuitpress.errors import CircuitpressError, RecipeError
from circuitpress.files import sha256
from circuitpress.mech.sae import save_sae
from circuitpress.mech.sites import Site
from circuitpress.recipe import Recipe
from circuitpress.run import run_recipe

from ..mech.sae.test_judge import some_sae

MakeRecipe = Callable[..., Recipe]


def test_a_run_with_features(
    tiny_llama: Path, text_file: Path, finished: Path, tmp_path: Path, console: Console, make_recipe: MakeRecipe
) -> None:
    folder = tmp_path / "sae"
    save_sae(some_sae(48, Site(1, "resid_post")), folder)
    entry = {"sae": str(folder), "top": 12, "weight": 50.0}
    recipe, out = make_recipe(tiny_llama, text_file, features=[entry]), tmp_path / "run"
    run_recipe(recipe, out, console)
    shards = sorted(path.name for path in (out / "pricing-features" / "0").iterdir())
    assert shards == ["block-00000.safetensors", "block-00001.safetensors", "scores.json", "scores.safetensors"]
    scores = json.loads((out / "pricing-features" / "0" / "scores.json").read_text())
    assert len(scores["provenance"]["features"]) == 12
    models = [{sha256(file) for file in (path / "model").glob("*.safetensors")} for path in (out, finished)]
    assert models[0] != models[1]
    # The same SAE elsewhere is the same run, another one is not.
    moved = tmp_path / "moved"
    folder.rename(moved)
    run_recipe(make_recipe(tiny_llama, text_file, features=[entry | {"sae": str(moved)}]), out, console)
    save_sae(some_sae(48, Site(1, "resid_post"), seed=1), moved)
    with pytest.raises(CircuitpressError, match=r"sae\.0\.sae_weights\.safetensors: the content changed"):
        run_recipe(make_recipe(tiny_llama, text_file, features=[entry | {"sae": str(moved)}]), out, console)


def test_a_missing_sae_is_told_with_the_recipe(tiny_llama: Path, text_file: Path, make_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"features\.0\.sae: no such file or folder: .*nowhere"):
        make_recipe(tiny_llama, text_file, features=[{"sae": "nowhere"}])
