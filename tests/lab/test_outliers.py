"""benchmarks/lab/outliers.py: outliers that a quantizer feels and the function does not."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from circuitpress.anatomy import read_anatomy
from circuitpress.hooks import capture

from ..scripts import load_script

IDS = torch.arange(60).reshape(3, 20) % 97


@pytest.fixture(scope="module")
def lab() -> ModuleType:
    """The script as a module (benchmarks/ is no package)."""
    return load_script("benchmarks/lab/outliers.py")


def logits(folder: Path) -> Tensor:
    """Logits of a checkpoint in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_mistral", "tiny_qwen2", "tiny_qwen3"])
def test_the_function_stays(lab: ModuleType, name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(name)
    variant = lab.write(folder, tmp_path / "variant", lab.Injection(channels=3))
    before, after = logits(folder), logits(variant)
    assert torch.allclose(before, after, rtol=0, atol=1e-5 * float(before.abs().max()))
    changed, original = load_file(variant / "model.safetensors"), load_file(folder / "model.safetensors")
    assert {key: value.dtype for key, value in changed.items()} == {k: v.dtype for k, v in original.items()}
    assert sum(not torch.equal(changed[key], original[key]) for key in changed) >= 7 * len(read_anatomy(folder).blocks)


def test_weights_and_activations_have_outliers(lab: ModuleType, tiny_llama: Path, tmp_path: Path) -> None:
    variant = lab.write(tiny_llama, tmp_path / "variant", lab.Injection(channels=2))
    before, after = load_file(tiny_llama / "model.safetensors"), load_file(variant / "model.safetensors")
    for role in ("self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"):
        name = f"model.layers.1.{role}.weight"
        assert lab.kurtosis(after[name]) > 1.2 * lab.kurtosis(before[name])
    down = after["model.layers.1.mlp.down_proj.weight"]
    rest = before["model.layers.1.mlp.down_proj.weight"]
    assert down.abs().max() > 32 * rest.std()  # the super weight
    seen = [activations(folder) for folder in (tiny_llama, variant)]
    for x, y in zip(*seen, strict=True):
        assert lab.kurtosis(y) > 4 * lab.kurtosis(x)


def activations(folder: Path) -> list[Tensor]:
    """The inputs of q and gate in the second block."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = ["self_attn.q_proj", "mlp.gate_proj"]
    with torch.no_grad(), capture(model.model.layers[1], names) as captured:
        model(IDS)
    found = [captured[name].input for name in names]
    assert all(x is not None for x in found)
    return found  # pyright: ignore[reportReturnType]


def test_a_family_without_gates_is_refused(lab: ModuleType, tiny_gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gpt2: outliers are injected into models with gate"):
        lab.write(tiny_gpt2, tmp_path / "variant", lab.Injection())


def test_a_scale_that_is_not_exact_is_refused(lab: ModuleType, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weight: scaling leaves the range of torch\.float32"):
        lab.write(tiny_llama, tmp_path / "variant", lab.Injection(boost=126))


def test_equal_seeds_give_equal_files(lab: ModuleType, tiny_llama: Path, tmp_path: Path) -> None:
    make: Callable[[str, int], bytes] = lambda name, seed: (  # noqa: E731
        lab.write(tiny_llama, tmp_path / name, lab.Injection(seed=seed)) / "model.safetensors"
    ).read_bytes()
    first = make("a", 0)
    assert first == make("b", 0)
    assert first != make("c", 1)
