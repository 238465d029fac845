"""The block-by-block walk against transformers' own forward pass and against autograd through the whole model."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from circuitpress.errors import CheckpointError
from circuitpress.stream import Stream, backward, forward, has_fast_bfloat16, open_stream

from .whole import MODELS, draw_labels, load, rewrite, tokens, trace


def walk(stream: Stream, ids: Tensor) -> Tensor:
    """The logits [n, length, vocab] of all windows."""
    batches, store = stream.batches(ids), stream.store("walk")
    forward(stream, batches, store)
    with torch.no_grad():
        result = torch.cat([stream.logits(store.get((stream.depth, b))) for b in range(len(batches))])
    store.clear()
    return result


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    ids = tokens(3, 11)
    stream = open_stream(folder)
    with torch.no_grad():
        expected = load(folder, torch.float32)(ids).logits
    assert stream.dtype == torch.float32  # also where the checkpoint is bfloat16
    # The same operations on the same batch: not one bit may differ.
    assert torch.equal(walk(stream, ids), expected)


@pytest.mark.parametrize("name", ["tiny_qwen3", "tiny_mistral"])
def test_logits_in_the_checkpoints_own_type(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = load(folder, torch.bfloat16)(ids).logits.float()
    assert torch.equal(walk(open_stream(folder, dtype="bfloat16"), ids), expected)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_micro_batches_of_unequal_size_agree_with_one_batch(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    ids = tokens(5, 7)
    stream = open_stream(folder, batch_tokens=14)
    assert [len(batch) for batch in stream.batches(ids)] == [2, 2, 1]
    with torch.no_grad():
        expected = load(folder, torch.float32)(ids).logits
    # Another shape of matmul may sum in another order: a few float32 roundings of logits of about 10.
    torch.testing.assert_close(walk(stream, ids), expected, rtol=0, atol=1e-4)


def test_a_window_longer_than_the_sliding_attention(tiny_mistral: Path, tmp_path: Path) -> None:
    """Every block must get the sliding mask: full attention would give other logits from the fifth token on."""
    folder = rewrite(tiny_mistral, tmp_path / "sliding", sliding_window=4)
    ids = tokens(2, 13)
    with torch.no_grad():
        expected, full = (load(path, torch.float32)(ids).logits for path in (folder, tiny_mistral))
    assert (expected - full).abs().amax((0, 2))[:4].max() == 0
    assert (expected - full).abs().amax((0, 2))[4:].min() > 0.01
    assert torch.equal(walk(open_stream(folder), ids), expected)


def test_blocks_that_differ_in_attention(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Qwen2 can slide from a given layer on: each block is called with its own mask."""
    kinds = ["full_attention", "sliding_attention"]
    changes: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
    folder = rewrite(tiny_qwen2, tmp_path / "mixed", **changes, layer_types=kinds)
    ids = tokens(2, 10)
    with torch.no_grad():
        expected, full = (load(path, torch.float32)(ids).logits for path in (folder, tiny_qwen2))
    assert not torch.equal(expected, full)
    assert torch.equal(walk(open_stream(folder), ids), expected)


@pytest.mark.parametrize("scaling", ["llama3", "yarn", "linear"])
def test_scaled_rotary_tables_are_recomputed(tiny_llama: Path, tmp_path: Path, scaling: str) -> None:
    """The tables are not in the checkpoint: they come from config.json, whose scaling must not be lost."""
    rope: dict[str, Any] = {"rope_type": scaling, "rope_theta": 100.0, "factor": 4.0}
    if scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    if scaling == "yarn":
        rope |= {"original_max_position_embeddings": 16}
    folder = rewrite(tiny_llama, tmp_path / "scaled", rope_parameters=rope)
    ids = tokens(2, 40)
    with torch.no_grad():
        expected, plain = (load(path, torch.float32)(ids).logits for path in (folder, tiny_llama))
    assert not torch.allclose(expected, plain, atol=0.1)
    assert torch.equal(walk(open_stream(folder), ids), expected)


def test_spilling_to_disk_changes_nothing(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from circuitpress.store import Store

    ids = tokens(6, 8)
    expected = walk(open_stream(tiny_llama, batch_tokens=16), ids)
    stream = open_stream(tiny_llama, batch_tokens=16, spill=tmp_path / "spill")
    # Room for one of the three batches of 2 x 8 x 48 float32.
    monkeypatch.setattr(stream, "store", lambda name: Store(tmp_path / "spill" / name, limit=2 * 8 * 48 * 4))
    store = stream.store("walk")
    forward(stream, stream.batches(ids), store, keep=True)
    assert len(list((tmp_path / "spill" / "walk").iterdir())) == 4 * 3 - 1
    with torch.no_grad():
        spilled = torch.cat([stream.logits(store.get((3, b))) for b in range(3)])
    assert torch.equal(spilled, expected)
    store.clear()
    assert not (tmp_path / "spill" / "walk").exists()


def test_inputs_are_let_go_unless_they_are_kept(tiny_llama: Path) -> None:
    stream = open_stream(tiny_llama, batch_tokens=8)
    batches = stream.batches(tokens(2, 8))
    for keep in (False, True):
        store = stream.store("x")
        forward(stream, batches, store, keep=keep)
        there = [(i, b) in store for i in range(4) for b in range(2)]
        assert there == [True] * 8 if keep else there == [False] * 6 + [True] * 2


def live_parameters() -> int:
    """Numbers held by all parameters made since `gc.freeze` that are not on the meta device."""
    gc.collect()
    # By exact type: `isinstance` would look into lazy objects, some of which warn when touched.
    return sum(p.numel() for p in gc.get_objects() if type(p) is nn.Parameter and not p.is_meta)


def test_one_block_is_in_memory_at_a_time(tiny_llama: Path) -> None:
    model = load(tiny_llama, torch.float32)
    of_block = sum(p.numel() for p in model.model.layers[1].parameters())
    outside = model.model.embed_tokens.weight.numel() + model.lm_head.weight.numel() + model.model.norm.weight.numel()
    gc.freeze()  # what is there already is not listed any more
    try:
        assert live_parameters() == 0
        stream = open_stream(tiny_llama)
        assert live_parameters() == outside
        seen: list[int] = []

        def visit(index: int, module: nn.Module, inputs: Callable[[int], Tensor]) -> None:
            assert inputs(0).shape == (2, 6, 48)
            assert not any(p.is_meta for p in module.parameters()), index
            seen.append(live_parameters())

        store = stream.store("x")
        forward(stream, stream.batches(tokens(2, 6)), store, keep=True, visit=visit)
        assert live_parameters() == outside
        gradients = stream.store("g")
        gradients.put((0, 0), torch.zeros(2, 6, 48))
        backward(stream, store, 1, visit)
        assert seen == [outside + of_block] * 6
        assert live_parameters() == outside
    finally:
        gc.unfreeze()


def test_backward_walks_down_and_lets_inputs_go(tiny_llama: Path) -> None:
    stream = open_stream(tiny_llama, batch_tokens=6)
    store = stream.store("x")
    forward(stream, stream.batches(tokens(2, 6)), store, keep=True)
    order: list[int] = []

    def visit(index: int, module: nn.Module, inputs: Callable[[int], Tensor]) -> None:
        order.append(index)
        assert (index + 1, 1) in store
        assert (index + 2, 1) not in store
        # What `inputs` hands out is this block's input: running it gives the next block's input.
        with torch.no_grad():
            assert torch.equal(stream.run(index, module, inputs(1)), store.get((index + 1, 1)))

    backward(stream, store, 2, visit)
    assert order == [2, 1, 0]


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_block_inputs_are_those_of_the_whole_model(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    ids = tokens(2, 8)
    model = load(folder, torch.float32)
    whole = trace(model, ids, draw_labels(torch.zeros(2, 8, 97)))
    stream = open_stream(folder)
    store = stream.store("x")
    forward(stream, [ids], store, keep=True)
    for index, expected in enumerate(whole.inputs):
        assert torch.equal(store.get((index, 0)), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "tensor",
    ["model.layers.1.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight", "model.embed_tokens.weight"],
)
def test_weights_that_are_not_finite_are_named(tiny_llama: Path, tmp_path: Path, tensor: str, bad: float) -> None:
    def spoil(state: dict[str, Tensor]) -> None:
        state[tensor].view(-1)[5] = bad

    folder = rewrite(tiny_llama, tmp_path / "bad", change=spoil)
    with pytest.raises(CheckpointError, match=f"{tensor} holds 1 NaN or infinite"):
        walk(open_stream(folder), tokens(1, 5))


def test_activations_that_overflow_name_the_block(tiny_llama: Path, tmp_path: Path) -> None:
    """Finite weights, but the product leaves float16."""

    def enlarge(state: dict[str, Tensor]) -> None:
        state["model.layers.1.mlp.down_proj.weight"] *= 3e4

    folder = rewrite(tiny_llama, tmp_path / "large", change=enlarge)
    with pytest.raises(CheckpointError, match="block 1 .*NaN or infinity in torch.float16") as caught:
        walk(open_stream(folder, dtype="float16"), tokens(1, 5))
    assert caught.value.hint == "set run.dtype to float32"
    walk(open_stream(folder), tokens(1, 5))


def test_a_missing_tensor_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    name = "model.layers.2.post_attention_layernorm.weight"
    folder = rewrite(tiny_llama, tmp_path / "less", change=lambda state: state.pop(name))
    with pytest.raises(CheckpointError, match=f"has no tensor {name}"):
        walk(open_stream(folder), tokens(1, 5))


def test_a_dead_neuron_and_a_dead_head_are_no_fault(tiny_llama: Path, tmp_path: Path) -> None:
    """Coarse rounding can zero all weights of a unit: the self-test of the hooks must not take that for a fault."""

    def kill(state: dict[str, Tensor]) -> None:
        for layer in range(3):
            state[f"model.layers.{layer}.mlp.down_proj.weight"][:, 0] = 0
            state[f"model.layers.{layer}.self_attn.o_proj.weight"][:, :8] = 0

    folder = rewrite(tiny_llama, tmp_path / "dead", change=kill)
    ids = tokens(2, 6)
    with torch.no_grad():
        expected = load(folder, torch.float32)(ids).logits
    assert torch.equal(walk(open_stream(folder), ids), expected)


@pytest.mark.parametrize(
    ("device", "knows", "fast"),
    [
        ("cpu", {"avx512_bf16": True}, True),
        ("cpu", {"amx_bf16": True, "avx512_bf16": False}, True),
        ("cpu", {"avx2": True}, False),
        ("cuda:1", True, True),
        ("cuda", False, False),
        ("mps", None, False),
    ],
)
def test_where_bfloat16_is_fast(device: str, knows: Any, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: knows, raising=False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: knows and not including_emulation)
    assert has_fast_bfloat16(device) is fast
