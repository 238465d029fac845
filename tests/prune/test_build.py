"""The pruned checkpoint, loaded by transformers alone, against the original with units closed by hooks."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitpress.prune.build as building
from circuitpress.anatomy import read_anatomy
from circuitpress.errors import CircuitpressError, RecipeError
from circuitpress.evaluate import fidelity
from circuitpress.files import sha256
from circuitpress.hooks import gate
from circuitpress.prune import prune
from circuitpress.stream import open_stream

from ..whole import blocks_of, divergence, linears, load, tokens, weight

CASES = [
    ("tiny_llama", 31, 3), ("tiny_llama", 52, 2), ("tiny_llama", 17, 1), ("tiny_mistral", 33, 1),
    ("tiny_qwen2", 23, 1), ("tiny_qwen3", 41, 1), ("tiny_gpt2", 29, 5),
]  # fmt: skip


def closed(model: Any, folder: Path, stay: Any, ids: Tensor) -> Tensor:
    """Logits of the original with the units that leave closed at the inputs of `o` and `down`."""
    import contextlib

    with contextlib.ExitStack() as stack:
        for block in read_anatomy(folder).blocks:
            width = block.heads // block.kv_heads * block.head_dim
            for kind, role, size in (("neuron", "down", 1), ("kv_group", "o", width)):
                mask = torch.zeros(block.role(role).cols // size, dtype=torch.float64)
                mask[torch.from_numpy(stay[block.index][kind])] = 1
                mask = mask.repeat_interleave(size)
                name = block.local(block.role(role))
                stack.enter_context(gate(blocks_of(model)[block.index], name, lambda x, mask=mask: x * mask))
        return model(ids, use_cache=False).logits


@torch.no_grad()
@pytest.mark.parametrize(("family", "neurons", "groups"), CASES)
def test_without_fitting_it_is_the_original_with_units_closed(
    family: str,
    neurons: int,
    groups: int,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    keep_some: Callable[..., Any],
) -> None:
    folder = request.getfixturevalue(family)
    stay, ids = keep_some(folder, neurons, groups), tokens(2, 19)
    prune(open_stream(folder), ids, stay, shards=tmp_path / "shards", out=tmp_path / "model", fit=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(tmp_path / "model")
    expected = closed(load(folder), folder, stay, ids)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-9, atol=1e-9)
    anatomy, original = read_anatomy(tmp_path / "model"), read_anatomy(folder)
    assert {(block.neurons, block.kv_heads) for block in anatomy.blocks} == {(neurons, groups)}
    assert anatomy.dtype == original.dtype
    assert anatomy.linear_numel == original.linear_numel > anatomy.present_numel
    assert anatomy.bits_per_weight == pytest.approx(8 * anatomy.linear_bytes / original.linear_numel)
    assert sum(weight(module).numel() for module in linears(model).values()) == anatomy.present_numel
    streamed = fidelity(open_stream(tmp_path / "model"), open_stream(folder), ids)
    if anatomy.dtype == "float32":
        exact = float(divergence(load(folder)(ids).logits, expected).mean())
        assert streamed.divergence.kl == pytest.approx(exact, rel=1e-3, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("family", "neurons", "groups"), [("tiny_llama", 40, 2), ("tiny_gpt2", 40, 5)])
def test_fitting_brings_the_residual_stream_of_every_block_nearer(
    family: str,
    neurons: int,
    groups: int,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    keep_some: Callable[..., Any],
) -> None:
    folder = request.getfixturevalue(family)
    stay, ids = keep_some(folder, neurons, groups), tokens(16, 23)
    states = {}
    for name in ("fit", "plain"):
        out = tmp_path / name
        prune(open_stream(folder), ids, stay, shards=tmp_path / "shards", out=out, fit=name == "fit")
        states[name] = load(out)(ids, output_hidden_states=True).hidden_states
    goal = load(folder)(ids, output_hidden_states=True).hidden_states
    # The last entry is after the final norm, which no block is fitted to.
    for k in range(1, len(goal) - 1):
        errors = {name: float((states[name][k] - goal[k]).square().mean()) for name in states}
        assert errors["fit"] < 0.8 * errors["plain"]


@torch.no_grad()
def test_the_first_attention_is_fitted_by_least_squares(
    tiny_llama: Path, tmp_path: Path, keep_some: Callable[..., Any]
) -> None:
    stay, ids = keep_some(tiny_llama, 52, 2), tokens(9, 21)
    prune(open_stream(tiny_llama, batch_tokens=64), ids, stay, shards=tmp_path / "s", out=tmp_path / "m")
    original = load(tiny_llama)
    seen: list[Tensor] = []
    o = blocks_of(original)[0].self_attn.o_proj
    o.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    original(ids)
    (x,) = seen
    left = torch.from_numpy(stay[0]["kv_group"])
    stays = (left[:, None] * 16 + torch.arange(16)).flatten()
    root = (1e-3 * x[:, stays].square().mean() * len(x)).sqrt()
    inputs = torch.cat([x[:, stays], root * torch.eye(len(stays), dtype=torch.float64)])
    outputs = torch.cat([x @ o.weight.T, root * o.weight[:, stays].T])
    expected = torch.linalg.lstsq(inputs, outputs).solution.T
    found = blocks_of(load(tmp_path / "m"))[0].self_attn.o_proj.weight
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_killed_build_goes_on_and_writes_the_same_bytes(
    tiny_qwen3: Path, tmp_path: Path, keep_some: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stay, ids = keep_some(tiny_qwen3, 30, 1), tokens(4, 17)

    def run(name: str, batch_tokens: int = 4096) -> dict[str, str]:
        stream = open_stream(tiny_qwen3, batch_tokens=batch_tokens)
        prune(stream, ids, stay, shards=tmp_path / name / "shards", out=tmp_path / name / "model")
        return {path.name: sha256(path) for path in sorted((tmp_path / name / "model").iterdir())}

    whole, fit, calls = run("whole"), building._fit, []

    def dies(*args: Any) -> Tensor:
        calls.append(args[0])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return fit(*args)

    monkeypatch.setattr(building, "_fit", dies)
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    assert not (tmp_path / "killed" / "model").exists()
    assert len(list((tmp_path / "killed").glob("shards/*/block-*"))) == 1
    assert run("killed") == whole
    assert calls == ["o", "down", "o", "down", "o", "down"]


def test_a_llama_whose_heads_no_longer_divide_is_written_as_mistral(
    tiny_llama: Path, tmp_path: Path, keep_some: Callable[..., Any]
) -> None:
    from transformers import AutoTokenizer

    anatomy = read_anatomy(tiny_llama)
    assert anatomy.hidden % 4 == 0
    for groups, kind in ((2, "llama"), (1, "llama")):
        prune(
            open_stream(tiny_llama), tokens(1, 9), keep_some(tiny_llama, 52, groups), shards=tmp_path / "s",
            out=tmp_path / str(groups), fit=False,
        )  # fmt: skip
        assert json.loads((tmp_path / str(groups) / "config.json").read_text())["model_type"] == kind
    assert len(AutoTokenizer.from_pretrained(tmp_path / "1")) == len(AutoTokenizer.from_pretrained(tiny_llama))


def test_rules(tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path, keep_some: Callable[..., Any]) -> None:
    def attempt(folder: Path, stay: Any) -> None:
        prune(open_stream(folder), tokens(1, 9), stay, shards=tmp_path / "shards", out=tmp_path / "model")

    with pytest.raises(RecipeError, match="prune.kv_groups: the heads of a gpt2 cannot leave"):
        attempt(tiny_gpt2, keep_some(tiny_gpt2, 20, 4))
    with pytest.raises(RecipeError, match="prune.kv_groups: 0 of 3 cannot stay"):
        attempt(tiny_llama, keep_some(tiny_llama, 20, 0))
    uneven = keep_some(tiny_llama, 20, 2)
    uneven[1] = keep_some(tiny_llama, 21, 2)[1]
    with pytest.raises(ValueError, match="same number of units"):
        attempt(tiny_llama, uneven)
    assert issubclass(RecipeError, CircuitpressError)
    assert not (tmp_path / "model").exists()
