"""Loading through transformers: the right logits in every type, generation, fresh processes, and what must raise."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from circuitpress.errors import CheckpointError, CircuitpressError
from circuitpress.runtime import hf
from circuitpress.runtime.linear import packed_linears

IDS = (torch.arange(22).view(2, 11) * 37 + 5) % 97
FAMILIES = ["packed_llama", "packed_gpt2"]

WITHOUT_IMPORT = """
import json, sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    for options in ({}, {"device_map": "cpu"}, {"dtype": "auto"}):
        try:
            AutoModelForCausalLM.from_pretrained(folder, **options)
        except Exception as error:
            sys.stdout.write(json.dumps(f"{type(error).__name__}: {error}") + chr(10))
        else:
            sys.stdout.write(json.dumps("loaded") + chr(10))
"""

WITH_IMPORT = """
import json, sys
import circuitpress
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model((torch.arange(22).view(2, 11) * 37 + 5) % 97).logits
    sys.stdout.write(json.dumps(logits.double().sum().item()) + chr(10))
"""


@pytest.fixture(params=FAMILIES)
def packed(request: pytest.FixtureRequest):
    return request.getfixturevalue(request.param)


def _logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.double()


def _load(folder: Path, **options) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def _error(logits: torch.Tensor, reference: torch.Tensor) -> float:
    return ((logits - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}], ids=["", "device_map"])
def test_float32_logits_are_those_of_the_dequantised_model(packed, options) -> None:
    model = _load(packed.folder, dtype=torch.float32, **options)
    listed = json.loads((packed.folder / "config.json").read_text())["quantization_config"]["modules"]
    assert packed_linears(model).keys() == listed.keys()
    assert _error(_logits(model), _logits(_load(packed.dense, dtype=torch.float32))) < 1e-5


def test_bfloat16_is_as_near_as_the_dense_model_in_bfloat16(packed) -> None:
    reference = _logits(_load(packed.dense, dtype=torch.float32))
    model = _load(packed.folder, dtype=torch.bfloat16)
    forms = {module.form for module in packed_linears(model).values()}
    assert forms == {"int4pack", "dense"}
    # Rounding weights and activations to bfloat16 costs the dense model this much; the packed one rounds the same
    # numbers and, in int4pack, scales instead of weights.
    rounding = _error(_logits(_load(packed.dense, dtype=torch.bfloat16)), reference)
    assert 0 < rounding < 0.05
    assert _error(_logits(model), reference) < 1.5 * rounding


def test_the_default_type_is_the_checkpoints_own(packed_llama) -> None:
    for options in ({"dtype": "auto"}, {"dtype": "bfloat16"}):
        model = _load(packed_llama.folder, **options)
        assert model.dtype == torch.bfloat16
        assert packed_linears(model)["model.layers.0.mlp.up_proj"].form == "int4pack"
    assert _load(packed_llama.folder, dtype=torch.float16).model.layers[0].mlp.up_proj.form == "dense"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_with_a_cache_is_that_of_the_whole_sequence(packed, dtype) -> None:
    model = _load(packed.folder, dtype=dtype)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(IDS[:1], **options, return_dict_in_generate=True, output_logits=True)
    assert cached.sequences.shape == (1, 19)
    with torch.no_grad():
        whole = model(cached.sequences).logits[0, 10:-1]
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert _error(torch.cat(cached.logits).double(), whole.double()) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_compiles_without_graph_breaks(packed_llama, dtype) -> None:
    model = _load(packed_llama.folder, dtype=dtype)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert _error(compiled(IDS, use_cache=False).logits.double(), _logits(model)) < 1e-6


def test_no_tensor_is_missing_or_left_over(packed) -> None:
    _, found = _load(packed.folder, output_loading_info=True)
    assert not any(found.values())


def test_a_fresh_process_raises_without_the_import_and_loads_with_it(packed_llama, packed_gpt2) -> None:
    folders = [str(packed_llama.folder), str(packed_gpt2.folder)]
    without = _python(WITHOUT_IMPORT, folders)
    assert len(without) == 6
    assert all(text.startswith("RuntimeError") and "mismatched" in text for text in without), without
    expected = [_logits(_load(Path(folder), dtype=torch.float32)).sum().item() for folder in folders]
    assert _python(WITH_IMPORT, folders) == pytest.approx(expected, rel=1e-4, abs=1e-2)


def _python(script: str, arguments: list[str]) -> list:
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_saving_says_to_copy_the_folder(packed_llama, tmp_path: Path) -> None:
    with pytest.raises(CircuitpressError, match="cannot be saved from memory") as caught:
        _load(packed_llama.folder).save_pretrained(tmp_path / "copy")
    assert "cp -r" in (caught.value.hint or "")
    assert not (tmp_path / "copy").exists()


def test_a_copied_folder_loads(packed_llama, tmp_path: Path) -> None:
    shutil.copytree(packed_llama.folder, tmp_path / "copy")
    assert torch.equal(_logits(_load(tmp_path / "copy")), _logits(_load(packed_llama.folder)))


def test_a_missing_tensor_is_named(packed_llama, tmp_path: Path) -> None:
    shutil.copytree(packed_llama.folder, tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    del state["model.layers.0.mlp.up_proj.scales"]
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="model.layers.0.mlp.up_proj.scales is missing"):
        _load(tmp_path / "model")


def test_a_tensor_of_the_wrong_length_raises(packed_llama, tmp_path: Path) -> None:
    shutil.copytree(packed_llama.folder, tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"][:-1].clone()
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="mismatched"):
        _load(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"version": 2}, "format version 2, this circuitpress reads 1"),
        ({"modules": {"model.layers.7.mlp.up_proj": {}}}, "damaged: 'shape' is missing|has none of that name"),
    ],
)
def test_a_config_that_does_not_fit_is_explained(packed_llama, tmp_path: Path, change: dict, cause: str) -> None:
    shutil.copytree(packed_llama.folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=cause):
        _load(tmp_path / "model")


def test_registering_again_changes_nothing() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    before = AUTO_QUANTIZER_MAPPING["circuitpress"]
    hf.register()
    assert AUTO_QUANTIZER_MAPPING["circuitpress"] is before
