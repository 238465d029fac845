"""Prices of a packed cache: against a decoder that takes one token after another, and against measured changes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from circuitpress.runtime.cache import GROUP, WINDOW, LayerBits, make_cache
from circuitpress.score.cache import OFFERED, attend_packed, price_cache, watch
from circuitpress.stream import open_stream
from circuitpress.units import Prices

LENGTH = 180
COLUMN = OFFERED.index(2)


def windows(count: int, *, length: int = LENGTH) -> torch.Tensor:
    """Random tokens [count, length]."""
    return torch.randint(1, 97, (count, length), generator=torch.Generator().manual_seed(0))


def only(prices: Prices, group: int, bits: int) -> list[LayerBits]:
    """16 bits for all heads but those of one group."""
    layers = 1 + max(other.layer for other in prices.groups)
    heads = len(prices.groups) // layers // 2
    table = np.full((layers, 2, heads), 16)
    _, side, head = prices.groups[group].name.split(".")
    table[prices.groups[group].layer, ("keys", "values").index(side), int(head)] = bits
    return [LayerBits(*(tuple(row) for row in layer)) for layer in table.tolist()]


@torch.no_grad()
def decoded(model: Any, ids: torch.Tensor, bits: list[LayerBits]) -> torch.Tensor:
    """Log-probabilities when tokens come one by one."""
    cache = make_cache(model, bits)
    steps = [model(step, past_key_values=cache).logits for step in ids.split(1, 1)]
    return torch.cat(steps, 1).log_softmax(-1)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_attention_is_that_of_a_decoder_with_such_a_cache(name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids = windows(2, length=64 if name == "tiny_gpt2" else LENGTH)
    heads = 5 if name == "tiny_gpt2" else 3
    found: list[torch.Tensor] = []
    block = model.transformer.h[0] if name == "tiny_gpt2" else model.model.layers[0]
    o = block.attn.c_proj if name == "tiny_gpt2" else block.self_attn.o_proj
    hook = o.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    with torch.no_grad(), watch() as calls:
        model(ids)
    for side in range(2):
        bits = [[16] * heads, [16] * heads]
        bits[side] = [2] * heads
        found.clear()
        decoded(model, ids, [LayerBits(*map(tuple, bits)), *[LayerBits((16,) * heads, (16,) * heads)] * 2])
        torch.testing.assert_close(
            attend_packed(calls[0], side, 2).flatten(2), torch.cat(found, 1), atol=2e-3, rtol=1e-3
        )  # 16-bit heads of a float32 model are float16 in the cache
    hook.remove()
    assert len(calls) == 3


def test_a_price_is_the_loss_when_one_head_is_packed(tiny_llama: Path) -> None:
    ids, stream = windows(24), open_stream(tiny_llama)
    prices = price_cache(stream, ids)
    assert prices.formats[COLUMN] == "cache2" and prices.nats.shape == (18, 7)
    assert not prices.nats[:, -1].any()
    # Bytes of 64 tokens of 8 channels: codes, a scale and a least number for each channel.
    assert prices.nbytes[0].tolist() == [*(64 * bits + 32 for bits in OFFERED), 1024]
    falling = np.sort(prices.nats[:, :-1], axis=1)[:, ::-1]
    assert np.allclose(falling, prices.nats[:, :-1])
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        exact = model(ids).logits.log_softmax(-1)
    measured = []
    for group in range(len(prices.groups)):
        changed = decoded(model, ids, only(prices, group, 2))
        measured.append(float((exact.exp() * (exact - changed)).sum(-1).mean()))
    ratio = np.array(measured) / prices.nats[:, COLUMN]
    assert np.corrcoef(np.log(measured), np.log(prices.nats[:, COLUMN]))[0, 1] > 0.9
    assert 0.5 < np.median(ratio) < 2
    assert np.isfinite(prices.stderr).all() and (prices.nats_sequence >= 0).all()


def test_nothing_is_lost_before_anything_is_packed(tiny_llama: Path) -> None:
    prices = price_cache(open_stream(tiny_llama), windows(2, length=WINDOW + GROUP))
    assert float(np.abs(prices.nats).max()) < 1e-9
    single = price_cache(open_stream(tiny_llama), windows(1, length=WINDOW + GROUP + 40))
    assert single.nats[:, 0].max() > 1e-6 and np.isinf(single.stderr[:, :-1]).all()
