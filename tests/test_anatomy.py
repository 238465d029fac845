"""Which parts a model has, from headers alone, against the modules that transformers builds."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from circuitpress.anatomy import read_anatomy
from circuitpress.errors import CheckpointError
from circuitpress.units import UnitId

from .whole import MODELS, blocks_of, linears, load, rewrite, weight

DIMENSIONS = {  # heads, KV heads, head size, neurons, of the configs in conftest.py
    "tiny_llama": (6, 3, 8, 52),
    "tiny_mistral": (4, 2, 6, 50),
    "tiny_qwen2": (3, 1, 12, 44),
    "tiny_qwen3": (4, 2, 10, 56),
    "tiny_gpt2": (5, 5, 8, 52),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_is_placed(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    anatomy, model = read_anatomy(folder), load(folder, torch.float32)
    maps = linears(model)
    placed = {matrix.module: matrix for block in anatomy.blocks for matrix in block.matrices}
    assert set(placed) == set(maps)
    for module, matrix in placed.items():
        assert (matrix.rows, matrix.cols) == tuple(weight(maps[module]).shape)
        assert matrix.transposed == (name == "tiny_gpt2")
    assert len(anatomy.blocks) == len(blocks_of(model))
    assert anatomy.linear_numel == sum(weight(m).numel() for m in maps.values())
    for i, block in enumerate(anatomy.blocks):
        assert (block.heads, block.kv_heads, block.head_dim, block.neurons) == DIMENSIONS[name]
        assert block.index == i
        assert model.get_submodule(block.prefix) is blocks_of(model)[i]
        assert all(f"{block.prefix}.{block.local(m)}" == m.module for m in block.matrices)
    config = model.config
    assert (anatomy.model_type, anatomy.vocab, anatomy.hidden) == (config.model_type, 97, config.hidden_size)
    assert anatomy.context == 64
    assert anatomy.tied == config.tie_word_embeddings == (name in ("tiny_qwen2", "tiny_qwen3", "tiny_gpt2"))
    assert anatomy.dtype == ("bfloat16" if name in ("tiny_qwen3", "tiny_mistral") else "float32")


@pytest.mark.parametrize("name", MODELS)
def test_bytes_add_up(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    anatomy = read_anatomy(folder)
    item = 2 if anatomy.dtype == "bfloat16" else 4
    assert anatomy.linear_bytes == item * anatomy.linear_numel
    assert anatomy.bits_per_weight == 8 * item
    assert anatomy.file_bytes == (folder / "model.safetensors").stat().st_size
    assert anatomy.other_bytes + anatomy.linear_bytes == anatomy.file_bytes


def test_roles_and_units(tiny_llama: Path) -> None:
    anatomy = read_anatomy(tiny_llama)
    block = anatomy.blocks[1]
    names = {m.role: m.module.rsplit(".", 1)[1] for m in block.matrices}
    assert names == {role: f"{role}_proj" for role in ("q", "k", "v", "o", "gate", "up", "down")}
    assert block.role("down").module == "model.layers.1.mlp.down_proj"
    units = block.units()
    assert len(units) == len(set(units)) == 6 + 3 + 52
    assert units[0] == UnitId(1, "head", 0)
    assert units[-1] == UnitId(1, "neuron", 51)
    assert len(anatomy.units()) == 3 * 61
    document = json.loads(json.dumps(anatomy.to_json()))
    assert document["linear_numel"] == anatomy.linear_numel
    assert document["blocks"][1]["matrices"][6]["module"] == "model.layers.1.mlp.down_proj"


def test_roles_of_gpt2(tiny_gpt2: Path) -> None:
    shapes = {m.role: (m.rows, m.cols) for m in read_anatomy(tiny_gpt2).blocks[0].matrices}
    assert shapes == {"qkv": (120, 40), "o": (40, 40), "up": (52, 40), "down": (40, 52)}


def test_gpt2_without_prefix_and_with_masks(tiny_gpt2: Path, tmp_path: Path) -> None:
    """The first GPT-2 checkpoints have neither `transformer.` nor a clean set of tensors: masks are stored too."""

    def strip(state: dict[str, Tensor]) -> None:
        for name in list(state):
            state[name.removeprefix("transformer.")] = state.pop(name)
        for layer in range(3):
            state[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
            state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    bare = rewrite(tiny_gpt2, tmp_path / "bare", change=strip)
    a, b = read_anatomy(tiny_gpt2), read_anatomy(bare)
    assert a.blocks == b.blocks
    assert a.linear_bytes == b.linear_bytes


def test_an_unsupported_architecture_names_a_module(tiny_llama: Path, tmp_path: Path) -> None:
    def experts(state: dict[str, Tensor]) -> None:
        state["model.layers.0.block_sparse_moe.gate.weight"] = torch.zeros(4, 48)

    folder = rewrite(tiny_llama, tmp_path / "moe", change=experts, model_type="mixtral")
    with pytest.raises(
        CheckpointError, match=r"'mixtral' is not supported: module model\.layers\.0\.block_sparse_moe\.gate"
    ):
        read_anatomy(folder)
    folder = rewrite(tiny_llama, tmp_path / "alias", model_type="yi")
    with pytest.raises(CheckpointError, match="'yi' is not supported: its blocks look like Llama's") as caught:
        read_anatomy(folder)
    assert caught.value.hint == "supported are gpt2, llama, mistral, qwen2, qwen3"


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_a_matrix_more_is_refused(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Nobody would price it: it would stay uncompressed in silence."""
    prefix = "model.layers" if name == "tiny_llama" else "transformer.h"
    extra = f"{prefix}.1.adapter.down.weight"
    folder = rewrite(
        request.getfixturevalue(name), tmp_path / "more", change=lambda s: s.update({extra: torch.zeros(3, 4)})
    )
    with pytest.raises(
        CheckpointError, match=rf"module {prefix}\.1\.adapter\.down \(shape \(3, 4\)\) could not be placed"
    ):
        read_anatomy(folder)


def test_more_blocks_than_the_config_says_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = rewrite(tiny_llama, tmp_path / "deep", num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"module model\.layers\.2\.\S+ .* could not be placed"):
        read_anatomy(folder)


def test_a_missing_or_misshapen_matrix(tiny_llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    folder = rewrite(tiny_llama, tmp_path / "less", change=lambda s: s.pop(f"{name}.weight"))
    with pytest.raises(CheckpointError, match=f"module {name} could not be placed: there is no such weight"):
        read_anatomy(folder)
    folder = rewrite(
        tiny_llama, tmp_path / "flat", change=lambda s: s.update({f"{name}.weight": s[f"{name}.weight"].flatten()})
    )
    with pytest.raises(CheckpointError, match=rf"module {name} could not be placed: its weight has shape \(2496,\)"):
        read_anatomy(folder)


@pytest.mark.parametrize("key", ["model_type", "num_hidden_layers", "num_attention_heads", "vocab_size", "hidden_size"])
def test_a_config_without_a_needed_key_is_a_clear_error(tiny_llama: Path, tmp_path: Path, key: str) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match="model type None" if key == "model_type" else f"config.json has no {key}"
    ):
        read_anatomy(folder)


def test_no_weight_is_read(tiny_llama: Path, tmp_path: Path) -> None:
    """Headers are enough: the tensors may be anything, and only the header's bytes are touched."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little") + 8
    with path.open("wb") as stream:  # a hole of the same size
        stream.write(data[:size])
        stream.truncate(len(data))
    assert read_anatomy(folder).blocks == read_anatomy(tiny_llama).blocks


def test_head_size_defaults_to_the_hidden_size_by_heads(tiny_gpt2: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    assert read_anatomy(tiny_gpt2).blocks[0].head_dim == 8
    folder = rewrite(tiny_qwen2, tmp_path / "default", head_dim=None)
    assert read_anatomy(folder).blocks[0].head_dim == 12


def test_quantized_and_packed_checkpoints(tiny_llama: Path, tmp_path: Path) -> None:
    folder = rewrite(tiny_llama, tmp_path / "ours", quantization_config={"quant_method": "circuitpress", "modules": {}})
    with pytest.raises(CheckpointError, match="already quantized"):
        read_anatomy(folder)
    assert read_anatomy(folder, packed_ok=True).blocks == read_anatomy(tiny_llama).blocks
    folder = rewrite(tiny_llama, tmp_path / "gptq", quantization_config={"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match=r"already quantized \(gptq\)"):
        read_anatomy(folder, packed_ok=True)
