"""Attention weights against transformers' own `output_attentions`, and scores by brute force."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from circuitpress.errors import CheckpointError
from circuitpress.mech.lens.attention import head_scores, patterns, repeated, score_pattern, weights
from circuitpress.mech.sites import walk
from circuitpress.stream import open_stream

from ...whole import MODELS, tokens


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_transformers(name: str, request: pytest.FixtureRequest) -> None:
    """Every supported family, with grouped heads, norms on q and k, Conv1D; the mask is the causal one."""
    from transformers import AutoModelForCausalLM

    folder, ids = request.getfixturevalue(name), tokens(3, 9)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(ids, output_attentions=True).attentions
    stream, found = open_stream(folder, dtype="float32"), []
    before = stream.embed(ids)

    def visit(index: int, module: Any, _: int, hidden: Tensor) -> Tensor:
        found.append(weights(stream, index, module, hidden))
        return stream.run(index, module, hidden)

    after = walk(stream, [ids], visit).get((stream.depth, 0))
    for layer, own in enumerate(found):
        torch.testing.assert_close(own, expected[layer], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(stream.logits(after), model(ids).logits.detach(), rtol=1e-3, atol=2e-3)
    assert torch.equal(stream.embed(ids), before)
    torch.testing.assert_close(patterns(stream, ids), torch.stack([w.mean(0) for w in expected]), rtol=1e-3, atol=1e-5)


def test_a_pattern_that_does_not_belong_to_the_output_is_an_error(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.models.llama.modeling_llama as llama

    true = llama.eager_attention_forward

    def wrong(*args: Any, **kwargs: Any) -> Any:
        output, seen = true(*args, **kwargs)
        return output * 1.01, seen

    monkeypatch.setattr(llama, "eager_attention_forward", wrong)
    with pytest.raises(CheckpointError, match="gives another output"):
        patterns(open_stream(tiny_llama), tokens(1, 5))
    monkeypatch.setattr(llama, "eager_attention_forward", lambda *a, **k: (true(*a, **k)[0], None))
    with pytest.raises(CheckpointError, match="returned no attention weights"):
        patterns(open_stream(tiny_llama), tokens(1, 5))


def test_the_models_own_attention_comes_back(tiny_llama: Path) -> None:
    stream, ids = open_stream(tiny_llama), tokens(2, 6)
    with stream.block(0) as module:
        hidden = stream.embed(ids)
        before = stream.run(0, module, hidden)
        weights(stream, 0, module, hidden)
        assert module.self_attn.config._attn_implementation == "sdpa"  # pyright: ignore
        assert torch.equal(stream.run(0, module, hidden), before)


@pytest.mark.parametrize("first", [None, 7])
def test_repeated_tokens(first: int | None) -> None:
    ids = repeated(40, segment=9, samples=5, seed=2, first=first, avoid=(0, 39))
    assert ids.shape == (5, 18 + (first is not None))
    if first is not None:
        assert (ids[:, 0] == first).all()
        ids = ids[:, 1:]
    assert torch.equal(ids[:, :9], ids[:, 9:])
    for row in ids:
        assert len(set(row.tolist())) == 9
        assert not {0, 39, first} & set(row.tolist())
    again = [repeated(40, segment=9, samples=5, seed=seed) for seed in (2, 2, 3)]
    assert torch.equal(again[0], again[1])
    assert not torch.equal(again[0], again[2])
    with pytest.raises(ValueError, match="too few for segments of 9"):
        repeated(10, segment=9, samples=1, avoid=(1, 2))


@pytest.mark.parametrize("offset", [0, 1])
def test_scores_of_ideal_heads(offset: int) -> None:
    """Patterns with all weight in one place; with and without a BOS token."""
    segment, length = 5, 10 + offset
    places = {
        "previous_token": lambda t: max(0, t - 1),
        "induction": lambda t: t - segment + 1 if t >= segment + offset else 1,
        "duplicate": lambda t: t - segment if t >= segment + offset else 1,
        "first_position": lambda _: 0,
    }
    for name, place in places.items():
        pattern = torch.zeros(length, length)
        for t in range(length):
            pattern[t, min(t, place(t))] = 1
        scores = score_pattern(pattern, segment)
        assert scores[name] == 1
        assert all(value < 0.6 for other, value in scores.items() if other != name)


def test_a_planted_previous_token_head(tiny_gpt2: Path, tmp_path: Path) -> None:
    """Head 3 of block 1 compares positions: its q and k are made to, and it scores as such; no other head does."""
    from ...whole import rewrite

    def plant(state: dict[str, Tensor]) -> None:
        d, head = 40, slice(24, 32)
        name = next(key for key in state if key.endswith("h.1.attn.c_attn.weight"))
        for key in [k for k in state if "wpe" in k or "wte" in k]:
            state[key][:, 32:] = 0  # the last eight directions carry a position code alone
        wpe = next(key for key in state if key.endswith("wpe.weight"))
        code = torch.nn.functional.normalize(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), dim=1)
        state[wpe][:] = 0
        state[wpe][:, 32:] = 20 * code
        # q at position t points where k of t-1 does: the code of t is mapped to that of t-1 by least squares.
        shift = torch.linalg.lstsq(code[1:9], code[:8]).solution
        state[name][:, head] = 0
        state[name][32:, head] = 4 * shift
        state[name][:, d + 24 : d + 32] = 0
        state[name][32:, d + 24 : d + 32] = 4 * torch.eye(8)
        for key in [k for k in state if ".h.0." in f".{k}" and "c_proj" in k]:
            state[key][:] = 0  # block 0 writes nothing
        for key in [k for k in state if k.endswith(("h.1.ln_1.weight", "h.1.attn.c_attn.bias", "h.1.ln_1.bias"))]:
            state[key][:] = 1.0 if key.endswith("weight") else 0.0

    folder = rewrite(tiny_gpt2, tmp_path / "planted", change=plant)
    ids = repeated(97, segment=4, samples=8)
    rows = head_scores(open_stream(folder), ids, 4)
    best = max(rows, key=lambda row: row.previous_token)
    assert (best.layer, best.head) == (1, 3)
    assert best.previous_token > 0.9
    assert best.induction < 0.1
