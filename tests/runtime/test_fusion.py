"""Fused layers: the numbers of unfused ones, whole graphs for the compiler, and what is left alone.

On a CPU the operators are their specifications; the kernels themselves are tested in tests/kernels.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from circuitpress.formats import IntFormat, parse
from circuitpress.runtime import hf
from circuitpress.runtime.descriptor import Descriptor
from circuitpress.runtime.fusion import Closing, FusedLinear, Share, fuse_layers, join, set_fusion
from circuitpress.runtime.linear import PackedLinear

from .conftest import Choices, write_packed

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.2,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0, "dtype": "float32",
}  # fmt: skip
ROWS = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "gate_proj": 172, "up_proj": 172}


def choices(*, unpacked: str = "") -> Choices:
    """Formats of all matrices of two layers, mixed; but for the module `unpacked`."""
    found: dict[str, Any] = {}
    for layer, place in ((layer, place) for layer in range(2) for place in ("self_attn", "mlp")):
        names = (
            ("q_proj", "k_proj", "v_proj", "o_proj") if place == "self_attn" else ("gate_proj", "up_proj", "down_proj")
        )
        for name in names:
            prefix = f"model.layers.{layer}.{place}.{name}"
            if name in ROWS:
                cut = ROWS[name] // 2 - 6
                found[prefix] = ("rows", [("int4g32", 0, cut), ("int3g32", cut, ROWS[name])])
            elif name == "o_proj":
                found[prefix] = ("cols", [("int4g32", 0, 32), ("int8g32", 32, 64)])
            else:
                found[prefix] = ("rows", [("int5g64", 0, 64)])
    return {name: choice for name, choice in found.items() if name != unpacked}


@pytest.fixture
def folder(build_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Makes a packed folder of a family."""

    def make(config: PretrainedConfig, **options: str) -> Path:
        source = build_checkpoint("fused", config)
        return write_packed(source, choices(**options), tmp_path, transposed=False).folder

    return make


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fuses on a CPU too."""
    hf.register()
    monkeypatch.setattr("circuitpress.runtime.quantizer.can_fuse", lambda _, dtype: dtype != torch.float32)


FAMILIES = [LlamaConfig(**SIZES), Qwen2Config(**SIZES), Qwen3Config(**SIZES)]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("config", FAMILIES, ids=["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fused_layers_compute_what_unfused_ones_do(
    config: Any, dtype: torch.dtype, folder: Callable[..., Path]
) -> None:
    path = folder(config)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    exact: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    layer = model.model.layers[0]
    assert isinstance(layer.self_attn.k_proj, Share) and isinstance(layer.mlp.down_proj, Closing)
    assert layer.fusion[0].linear.out_features == 128 and layer.fusion[1].linear.out_features == 344
    ids = torch.randint(1, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        fused = model(ids).logits.double()
        set_fusion(model, False)
        unfused = model(ids).logits.double()
        wanted = exact(ids).logits.double()
    # Fused layers round less often, so they are no further from the truth than unfused ones.
    assert (fused - wanted).norm() <= 1.1 * (unfused - wanted).norm()
    assert (fused - wanted).norm() / wanted.norm() < (4e-3 if dtype == torch.float16 else 4e-2)
    set_fusion(model, True)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    assert [state.shape for state in states] == [(2, 20, 64)] * 3 and not torch.equal(states[0], states[1])
    generated = model.generate(ids[:1, :8], max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0)
    with torch.no_grad():
        choice = model(generated[:, :-1]).logits[0, 7:].double()
    chosen = choice.gather(1, generated[0, 8:, None])[:, 0]
    assert bool((choice.max(1).values - chosen <= 0.02 * choice.abs().max()).all())


@pytest.mark.usefixtures("as_on_a_gpu")
def test_fused_layers_are_one_graph(folder: Callable[..., Path]) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder(FAMILIES[0]), dtype=torch.float16)
    ids = torch.randint(1, 97, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        for _ in range(2):
            found = torch.compile(model, backend="eager", fullgraph=True)(ids, use_cache=False).logits
            assert torch.equal(found, wanted)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_layer_with_a_matrix_that_is_not_packed_stays_as_it_is(folder: Callable[..., Path]) -> None:
    path = folder(FAMILIES[0], unpacked="model.layers.0.self_attn.v_proj")
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16)
    assert type(model.model.layers[0].self_attn.q_proj) is PackedLinear
    assert isinstance(model.model.layers[1].self_attn.q_proj, Share)
    ids = torch.ones(1, 5, dtype=torch.long)
    assert bool(model(ids).logits.isfinite().all())


def test_on_a_cpu_and_in_other_models_nothing_is_fused(folder: Callable[..., Path]) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder(FAMILIES[0]), dtype=torch.float16)
    assert not hasattr(model.model.layers[0], "fusion")
    model.config.hidden_act = "gelu"
    assert fuse_layers(model, torch.float16) == 0


def linear(
    segments: list[tuple[str, int, int]], rows: int, cols: int, *, axis: str = "rows", bias: bool = False
) -> PackedLinear:
    """A stored map with random weights on grids."""
    cut = [{"format": name, "start": start, "stop": stop} for name, start, stop in segments]
    module = PackedLinear(Descriptor.from_json("m", {"shape": [rows, cols], "axis": axis, "segments": cut}), bias=bias)
    generator = torch.Generator().manual_seed(rows)
    for name, buffer in module.stored.items():
        if name == "trellis_base":
            buffer.copy_(torch.tensor([0.5, 0.02]))
        elif buffer.is_floating_point():
            buffer.copy_(0.001 + torch.rand(buffer.shape, generator=generator) / 100)
        else:
            few = name == "zeros" or buffer.dtype == torch.int8
            buffer.copy_(torch.randint(0, 5 if few else 256, buffer.shape, generator=generator))
    if module.bias is not None:
        module.bias = nn.Parameter(torch.randn(rows, generator=generator).half(), requires_grad=False)
    return module


def test_joined_maps_are_their_rows_one_below_the_other() -> None:
    maps = [
        linear([("int4g32", 0, 20), ("int3g64", 20, 33)], 33, 96, bias=True),
        linear([("int8g32", 0, 96)], 7, 96, axis="cols", bias=True),
        linear([("code3g32", 0, 64), ("int4g32", 64, 70)], 70, 96, bias=True),
    ]
    assert isinstance(parse("int4g32"), IntFormat)
    wanted = torch.cat([module.dequantize() for module in maps])
    joined = join(maps)
    assert isinstance(joined, FusedLinear)
    assert torch.equal(joined.dequantize(), wanted)
    joined.repack(torch.float16)
    assert torch.equal(joined.dequantize(), wanted)
    x = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(0)).half()
    biases = torch.cat([module.bias.data for module in maps if module.bias is not None])
    torch.testing.assert_close(joined(x), (x.float() @ wanted.T + biases).half())
    assert join([maps[0], linear([("int4g32", 0, 8)], 8, 96)]) is None
    assert join([linear([("int4g32", 0, 32), ("int3g32", 32, 96)], 8, 96, axis="cols")] * 2) is None


@pytest.mark.parametrize("cols", [256, 352, 172])
def test_a_trellis_is_turned_by_the_kernel_where_its_blocks_are_powers_of_two(cols: int) -> None:
    maps = [linear([("trellis2", 0, 64)], 64, cols), linear([("trellis3", 0, 32), ("int4g32", 32, 40)], 40, cols)]
    wanted = torch.cat([module.dequantize() for module in maps])
    joined = join(maps)
    assert joined is not None
    joined.repack(torch.float16)
    assert joined.block == {256: 128, 352: 32, 172: 0}[cols]
    x = torch.randn(3, cols, generator=torch.Generator().manual_seed(0)).half()
    norm = Norm(cols)
    residual = torch.randn(3, 52, generator=torch.Generator().manual_seed(1)).half()
    found = joined(x, norm=norm, residual=None, gated=True)
    gate, up = (norm(x).double() @ wanted.double().T).chunk(2, 1)
    exact = gate * torch.sigmoid(gate) * up
    assert found.shape == residual.shape
    assert (found.double() - exact).norm() / exact.norm() < 4e-3


class Norm(nn.Module):
    """An RMSNorm as transformers writes it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, size).half(), requires_grad=False)
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        """Rounded before the weight."""
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)).half()
