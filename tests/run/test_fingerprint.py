"""Changed inputs are named and stop a rerun; moved ones do not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from circuitpress.console import Console
from circuitpress.errors import CircuitpressError
from circuitpress.recipe import Recipe
from circuitpress.run import run_recipe
from circuitpress.run.fingerprint import digest_checkpoint, digest_pieces

MakeRecipe = Callable[..., Recipe]
Digests = Callable[[Path], dict[str, str]]
Forbid = Callable[..., None]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"plan.budget": "4bpw"}, "plan.budget: '5bpw' -> '4bpw'"),
        ({"data.samples": 7}, "data.samples: 6 -> 7"),
        ({"quantize.group_size": 8, "data.seed": 1}, "quantize.group_size: 16 -> 8"),
        ({"plan.formats": ["int4"]}, "plan.formats: ['int2', 'int4', 'int8', 'dense'] -> ['int4']"),
    ],
)
def test_a_changed_setting_is_named_and_nothing_is_touched(
    tiny_llama: Path,
    text_file: Path,
    copy: Path,
    changes: dict[str, Any],
    line: str,
    console: Console,
    make_recipe: MakeRecipe,
    digests: Digests,
) -> None:
    before = digests(copy / "model"), (copy / "manifest.json").read_bytes(), (copy / "recipe.yaml").read_bytes()
    with pytest.raises(CircuitpressError, match="holds a run with other inputs") as caught:
        run_recipe(make_recipe(tiny_llama, text_file, **changes), copy, console)
    assert line in caught.value.message
    assert len(caught.value.message.splitlines()) == 1 + len(changes)
    assert "--restart" in str(caught.value.hint)
    assert ("circuitpress plan" in str(caught.value.hint)) == ("plan.budget" in changes)
    assert before == (
        digests(copy / "model"),
        (copy / "manifest.json").read_bytes(),
        (copy / "recipe.yaml").read_bytes(),
    )


def test_changed_weights_and_text_are_named(
    tiny_llama: Path,
    tiny_mistral: Path,
    text_file: Path,
    tmp_path: Path,
    copy: Path,
    console: Console,
    make_recipe: MakeRecipe,
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[::-1])
    with pytest.raises(CircuitpressError, match="text.data.calibration: the content changed"):
        run_recipe(make_recipe(tiny_llama, other), copy, console)
    with pytest.raises(
        CircuitpressError, match="(?s)model: .*weights.model.safetensors: the content changed"
    ) as caught:
        run_recipe(make_recipe(tiny_mistral, text_file), copy, console)
    assert str(tiny_mistral) in caught.value.message


def test_a_moved_checkpoint_text_or_device_is_the_same_run(
    tiny_llama: Path,
    text_file: Path,
    tmp_path: Path,
    copy: Path,
    console: Console,
    make_recipe: MakeRecipe,
    forbid: Forbid,
) -> None:
    forbid()
    moved = Path(shutil.copytree(tiny_llama, tmp_path / "moved", copy_function=shutil.copyfile))
    text = Path(shutil.copyfile(text_file, tmp_path / "moved.txt"))
    recipe = make_recipe(moved, text, **{"run.device": "auto", "evaluate.max_kl": 99})
    run_recipe(recipe, copy, console)
    assert str(moved) in (copy / "recipe.yaml").read_text()


def test_restart_throws_the_old_run_away_and_only_that(
    tiny_llama: Path, text_file: Path, copy: Path, console: Console, make_recipe: MakeRecipe
) -> None:
    (copy / "notes.txt").write_text("mine")
    changed = make_recipe(tiny_llama, text_file, **{"plan.budget": "4bpw", "score.exact": 0, "plan.probes": []})
    _, document = run_recipe(changed, copy, console, restart=True)
    assert document["bits_per_weight"] <= 4
    assert document["predicted_kl_corrected"] is None
    assert json.loads((copy / "exact.json").read_text())["rows"] == []
    assert (copy / "notes.txt").read_text() == "mine"


def test_large_files_are_recognised_by_pieces(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    whole = digest_checkpoint(folder)
    assert set(whole) >= {"model.safetensors", "config.json", "tokenizer.json"}
    monkeypatch.setattr("circuitpress.run.fingerprint.WHOLE", 10)
    monkeypatch.setattr("circuitpress.run.fingerprint._PIECE", 512)
    sampled = digest_checkpoint(folder)
    assert sampled["model.safetensors"].startswith("pieces:")
    assert sampled["config.json"] == whole["config.json"]
    data = bytearray((folder / "model.safetensors").read_bytes())
    for at in (200, len(data) - 1):  # a name in the header, the last weight
        changed = data.copy()
        changed[at] ^= 1
        (folder / "changed").write_bytes(changed)
        assert digest_pieces(folder / "changed") != sampled["model.safetensors"]
