"""Packed folders that the tests write themselves, by min-max rounding, beside the same model with dense weights."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from circuitpress.formats import IntCodes, IntFormat, parse

Segments = Sequence[tuple[str, int, int]]
Choices = Mapping[str, tuple[str, Segments]]


class PackedFolder(NamedTuple):
    """`folder` is packed; `dense` holds the same weights, dequantised, in float32 and no quantization_config."""

    folder: Path
    dense: Path


def round_to(name: str, weight: Tensor) -> Any:
    """The value that a format packs: codes on a min-max grid, or the weights themselves."""
    kind = parse(name)
    if not isinstance(kind, IntFormat):
        return weight
    rows, cols = weight.shape
    pieces = [piece.float() for piece in weight.split(kind.group_size, dim=1)]
    low = torch.stack([piece.amin(1) for piece in pieces], 1).clamp(max=0)
    high = torch.stack([piece.amax(1) for piece in pieces], 1).clamp(min=0)
    top = 2**kind.bits - 1
    scales = ((high - low) / top).clamp(min=1e-6).half()
    zeros = (-low / scales.float()).round().clamp(0, top)
    column = torch.arange(cols) // kind.group_size
    codes = (weight.float() / scales.float()[:, column] + zeros[:, column]).round().clamp(0, top)
    return IntCodes(codes.to(torch.uint8), scales, zeros.to(torch.uint8))


def pack_matrix(weight: Tensor, axis: str, segments: Segments) -> tuple[dict[str, Tensor], Tensor]:
    """(flat tensors, float32 [rows, cols] that they stand for) of a matrix cut into segments."""
    flat: dict[str, list[Tensor]] = {}
    decoded = []
    for name, start, stop in segments:
        kind = parse(name)
        value = round_to(name, weight[start:stop] if axis == "rows" else weight[:, start:stop])
        for tensor, content in kind.pack(value).items():
            flat.setdefault(tensor, []).append(content)
        decoded.append(kind.decode(value))
    return {name: torch.cat(parts) for name, parts in flat.items()}, torch.cat(decoded, 0 if axis == "rows" else 1)


def write_packed(source: Path, choices: Choices, out: Path, *, transposed: bool) -> PackedFolder:
    """Packs the modules of `choices` (module -> axis, segments) of a dense folder into `out`."""
    packed, dense = out / "packed", out / "dense"
    state = load_file(source / "model.safetensors")
    twin = {name: tensor.float() for name, tensor in state.items()}
    modules = {}
    for module, (axis, segments) in choices.items():
        name = next(name for name in state if name.endswith(f"{module}.weight"))
        weight = state.pop(name)
        flat, decoded = pack_matrix(weight.T if transposed else weight, axis, segments)
        state |= {name.removesuffix("weight") + tensor: content for tensor, content in flat.items()}
        twin[name] = (decoded.T if transposed else decoded).contiguous()
        cut = [{"format": kind, "start": start, "stop": stop} for kind, start, stop in segments]
        modules[module] = {"shape": list(decoded.shape), "axis": axis, "segments": cut}
    for folder, content in ((packed, state), (dense, twin)):
        shutil.copytree(source, folder)
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    quantization = {"quant_method": "circuitpress", "version": 1, "modules": modules}
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    (dense / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return PackedFolder(packed, dense)


@pytest.fixture(scope="session")
def matrix_packer() -> Callable[[Tensor, str, Segments], tuple[dict[str, Tensor], Tensor]]:
    """`pack_matrix`."""
    return pack_matrix


@pytest.fixture(scope="session")
def packed_llama(build_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> PackedFolder:
    """Llama, bfloat16: hidden 64, 8 heads on 2 KV heads, 172 neurons, biases on q, k, v and o; formats mixed."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, attention_bias=True,
        bos_token_id=0, eos_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    choices: Choices = {
        "model.layers.0.self_attn.q_proj": ("rows", [("int4g32", 0, 32), ("int2g32", 32, 64)]),
        "model.layers.0.self_attn.k_proj": ("rows", [("int3g64", 0, 16)]),
        "model.layers.0.self_attn.v_proj": ("rows", [("int8g64", 0, 16)]),
        "model.layers.0.self_attn.o_proj": ("cols", [("int4g32", 0, 32), ("int3g32", 32, 64)]),
        "model.layers.0.mlp.gate_proj": ("rows", [("int4g64", 0, 99), ("bfloat16", 99, 172)]),
        "model.layers.0.mlp.up_proj": ("rows", [("int4g32", 0, 172)]),
        "model.layers.0.mlp.down_proj": ("cols", [("int4g32", 0, 96), ("int5g32", 96, 172)]),
        "model.layers.1.self_attn.q_proj": ("rows", [("int4g16", 0, 64)]),
        "model.layers.1.mlp.down_proj": ("rows", [("int4g64", 0, 64)]),
    }
    source = build_checkpoint("packed-llama", config)
    return write_packed(source, choices, tmp_path_factory.mktemp("llama"), transposed=False)


@pytest.fixture(scope="session")
def packed_gpt2(build_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> PackedFolder:
    """GPT-2, float32, Conv1D with biases, tied: hidden 64, 172 neurons; formats mixed."""
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_inner=172, n_positions=64, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0, dtype="float32",
    )  # fmt: skip
    choices: Choices = {
        "transformer.h.0.attn.c_attn": ("rows", [("int4g32", 0, 64), ("int3g32", 64, 192)]),
        "transformer.h.0.mlp.c_fc": ("rows", [("int4g64", 0, 172)]),
        "transformer.h.1.attn.c_proj": ("cols", [("int4g32", 0, 48), ("float32", 48, 64)]),
        "transformer.h.1.mlp.c_proj": ("rows", [("int6g64", 0, 64)]),
    }
    source = build_checkpoint("packed-gpt2", config)
    return write_packed(source, choices, tmp_path_factory.mktemp("gpt2"), transposed=True)
