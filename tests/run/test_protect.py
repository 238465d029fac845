"""Protected parts: what they forbid to prune, and their names in the pruned model."""

from pathlib import Path

import pytest

from circuitpress.anatomy import read_anatomy
from circuitpress.errors import RecipeError
from circuitpress.run.protect import protected_units, refuse_too_narrow, translate
from circuitpress.widths import Widths


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("L1.neuron.7", {"L1.neuron.7"}),
        ("L0.head.3", {"L0.kv_group.1"}),
        ("L2.kv_group.*", {"L2.kv_group.0", "L2.kv_group.1", "L2.kv_group.2"}),
        ("L0.neuron.5?", {"L0.neuron.50", "L0.neuron.51"}),
        ("model.layers.1.self_attn.k_proj", {"L1.kv_group.0", "L1.kv_group.1", "L1.kv_group.2"}),
    ],
)
def test_patterns_name_units_that_stay(tiny_llama: Path, pattern: str, expected: set[str]) -> None:
    assert {str(unit) for unit in protected_units(read_anatomy(tiny_llama), [pattern])} == expected


def test_a_layer_keeps_everything(tiny_llama: Path) -> None:
    anatomy = read_anatomy(tiny_llama)
    keep = protected_units(anatomy, ["L1"])
    assert len(keep) == 52 + 3
    refuse_too_narrow(anatomy, Widths(52, 3), keep)
    with pytest.raises(RecipeError, match=r"prune.neurons: layer 1 would keep 51, and 52 are protected"):
        refuse_too_narrow(anatomy, Widths(51, 3), keep)


def test_units_are_counted_anew(tiny_llama: Path) -> None:
    anatomy = read_anatomy(tiny_llama)
    stay = {layer: {"neuron": [3, 7, 50], "kv_group": [0, 2]} for layer in range(3)}
    patterns = ["L1.neuron.50", "L0.head.4", "L2.kv_group.0", "L2", "*.down_proj", "L0.neuron.50"]
    assert translate(patterns, anatomy, stay) == (
        "L1.neuron.2", "L0.head.2", "L2.kv_group.0", "L2", "*.down_proj", "L0.neuron.2",
    )  # fmt: skip
