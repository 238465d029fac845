"""A cache of few bits in transformers' models: equal to its specification, and usable as transformers' own is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from circuitpress.errors import CheckpointError
from circuitpress.runtime.cache import (
    GROUP,
    KEY,
    WINDOW,
    LayerBits,
    PackedLayer,
    bits_to_json,
    cache_bytes,
    form_of,
    make_cache,
    read_bits,
    uniform_bits,
)
from circuitpress_kernels.kv import pack_cache, read_cache_twin

BITS = LayerBits((4, 16, 2), (8, 3, 16))


def states(tokens: int, *, seed: int = 0, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Keys and values [batch, 3, tokens, 10]."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, 3, tokens, 10, generator=generator)
    return keys, values


def expected(part: Tensor, bits: tuple[int, ...], packed: int) -> Tensor:
    """What attention gets of keys or values when `packed` tokens are packed."""
    if not packed:
        return part
    form = form_of(bits, part.shape[-1])
    return torch.cat([read_cache_twin(pack_cache(part[:, :, :packed], form), form, part.dtype), part[:, :, packed:]], 2)


@pytest.mark.parametrize("chunks", [[1] * 230, [150, 1, 1, 78], [100, 130], [7, 90, 133]])
def test_old_tokens_are_packed_once_and_recent_ones_stay(chunks: list[int]) -> None:
    keys, values = states(230)
    layer, packed, seen = PackedLayer(BITS), 0, 0
    for chunk in chunks:
        found = layer.update(keys[:, :, seen : seen + chunk], values[:, :, seen : seen + chunk])
        seen += chunk
        for part, whole, bits in zip(found, (keys, values), BITS, strict=True):
            assert torch.equal(part, expected(whole[:, :, :seen], bits, packed))
        packed = max(0, seen - WINDOW) // GROUP * GROUP
        assert layer.get_seq_length() == seen
        assert layer.get_mask_sizes(1)[0] - packed >= WINDOW or not packed
    assert packed == 192
    # In float32 the recent tokens take twice what `cache_bytes` says of 16 bits.
    assert layer.nbytes == 2 * cache_bytes([BITS], 10, 230) + 2 * (230 - packed) * 2 * 10 * 6


@pytest.mark.parametrize("left", [229, 200, 192, 150, 64, 3])
def test_a_cropped_cache_goes_on_as_if_the_rest_had_never_been(left: int) -> None:
    keys, values = states(300)
    layer = PackedLayer(BITS)
    layer.update(keys[:, :, :230], values[:, :, :230])
    layer.crop(left - 230)
    assert layer.get_seq_length() == left
    found = layer.update(keys[:, :, left:], values[:, :, left:])
    packed = 192
    for part, whole, bits in zip(found, (keys, values), BITS, strict=True):
        wanted = torch.cat([expected(whole[:, :, :230], bits, packed)[:, :, :left], whole[:, :, left:]], 2)
        assert torch.equal(part, wanted)


def test_sequences_are_reordered_repeated_and_chosen() -> None:
    keys, values = states(130, batch=3)
    layer = PackedLayer(BITS)
    layer.update(keys, values)
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([5, 0, 3, 3, 1, 2]))
    layer.batch_select_indices(torch.tensor([0, 2, 4]))
    order = [2, 1, 0]
    found = layer.update(*states(1, seed=1, batch=3))
    for part, whole, bits in zip(found, (keys, values), BITS, strict=True):
        assert torch.equal(part[:, :, :130], expected(whole[order], bits, 64))
    layer.reset()
    assert (layer.get_seq_length(), layer.nbytes) == (0, 0)


def test_generation_and_log_probabilities_follow_the_cache(tiny_llama: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)
    ids = torch.randint(1, 97, (2, 200), generator=torch.Generator().manual_seed(0))
    arguments: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    plain = model.generate(ids, **arguments)
    cache = make_cache(model, uniform_bits(model, 8))
    assert torch.equal(model.generate(ids, past_key_values=cache, **arguments), plain)
    beams = model.generate(ids, num_beams=3, **arguments)
    cache = make_cache(model, uniform_bits(model, 8))
    assert torch.equal(model.generate(ids, num_beams=3, past_key_values=cache, **arguments), beams)

    distances = []
    with torch.no_grad():
        exact = model(ids).logits[:, 150:].log_softmax(-1)
        for bits in (16, 8, 4, 2):
            cache = make_cache(model, uniform_bits(model, bits))
            model(ids[:, :150], past_key_values=cache)
            found = model(ids[:, 150:], past_key_values=cache).logits.log_softmax(-1)
            distances.append(float((exact.exp() * (exact - found)).sum(-1).mean()))
    assert distances == sorted(distances)
    assert distances[0] < 1e-5 < distances[2]


def test_the_bits_are_those_of_config_json(tiny_llama: Path, tmp_path: Path) -> None:
    layers = (BITS, LayerBits((16, 16, 16), (2, 2, 2)), BITS)
    assert read_bits(json.loads(json.dumps({KEY: bits_to_json(layers)}))) == layers
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {KEY: bits_to_json(layers)}))
    cache = make_cache(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert [layer.bits for layer in cache.layers] == list(layers)  # pyright: ignore


def test_what_does_not_fit_is_refused_in_words(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with pytest.raises(CheckpointError, match="says nothing"):
        make_cache(model)
    with pytest.raises(CheckpointError, match="for 1 layers, the model has 3"):
        make_cache(model, [BITS])
    with pytest.raises(CheckpointError, match="for 2 KV heads, the layer has 3"):
        make_cache(model, [LayerBits((4, 4), (4, 4))] * 3).update(*states(4), 0)
    for damaged in (
        {"version": 2, "layers": []},
        {"version": 1},
        {"version": 1, "layers": [{"keys": [7], "values": [4]}]},
        {"version": 1, "layers": [{"keys": [4, 4], "values": [4]}]},
    ):
        with pytest.raises(CheckpointError, match="damaged"):
            read_bits({KEY: damaged})


def test_layers_with_a_sliding_window_keep_transformers_own(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    model.config.sliding_window = 8
    kinds = [type(layer) for layer in make_cache(model, uniform_bits(model, 4)).layers]
    assert kinds == [PackedLayer, DynamicSlidingWindowLayer, PackedLayer]
    assert [type(layer) for layer in DynamicCache(config=model.config).layers][1] is DynamicSlidingWindowLayer
