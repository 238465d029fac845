"""Widths: the shapes after pruning, and configs that transformers builds those very shapes from."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from circuitpress.anatomy import read_anatomy
from circuitpress.errors import RecipeError
from circuitpress.widths import Widths, full_widths, kept, narrow, write_config

from .whole import linears, weight


def test_fractions_become_whole_units_and_one_stays() -> None:
    assert [kept(172, fraction) for fraction in (0.0, 0.1, 0.25, 0.5, 0.999)] == [172, 155, 129, 86, 1]
    assert [kept(4, fraction) for fraction in (0.1, 0.25, 0.5, 0.9)] == [4, 3, 2, 1]


@pytest.mark.parametrize(
    ("family", "neurons", "groups"),
    [("tiny_llama", 11, 2), ("tiny_mistral", 50, 1), ("tiny_qwen2", 7, 1), ("tiny_qwen3", 55, 1), ("tiny_gpt2", 9, 5)],
)
def test_transformers_builds_the_shapes_that_are_planned(
    family: str, neurons: int, groups: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    anatomy = read_anatomy(request.getfixturevalue(family))
    widths = Widths(neurons, groups)
    document = json.loads((anatomy.folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(write_config(document, anatomy, widths)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    after = narrow(anatomy, widths)
    shapes = {matrix.module: (matrix.rows, matrix.cols) for block in after.blocks for matrix in block.matrices}
    assert shapes == {name: tuple(weight(module).shape) for name, module in linears(model).items()}
    assert after.linear_numel == anatomy.linear_numel
    assert after.linear_bytes * anatomy.present_numel == anatomy.linear_bytes * after.present_numel
    assert full_widths(after) == widths


def test_a_llama_with_a_number_of_heads_that_its_config_refuses(tiny_llama: Path) -> None:
    """Hidden 48: 5 heads a group make 5 and 10 heads, which do not divide it."""
    from dataclasses import replace

    anatomy = read_anatomy(tiny_llama)
    blocks = tuple(replace(block, heads=15) for block in anatomy.blocks)
    odd = replace(anatomy, blocks=blocks)
    config = json.loads((tiny_llama / "config.json").read_text())
    written = write_config(config, odd, Widths(52, 2))
    assert written["model_type"] == "mistral"
    assert written["num_attention_heads"] == 10
    assert written["sliding_window"] is None
    with pytest.raises(RecipeError, match="Llama takes no 10 heads at hidden size 48"):
        write_config(config | {"attention_bias": True}, odd, Widths(52, 2))


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        (Widths(0, 3), "prune.neurons: 0 of 52"),
        (Widths(53, 3), "prune.neurons: 53 of 52"),
        (Widths(52, 0), "prune.kv_groups: 0 of 3"),
    ],
)
def test_impossible_widths(tiny_llama: Path, widths: Widths, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        narrow(read_anatomy(tiny_llama), widths)
