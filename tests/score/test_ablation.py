"""Exact ablation against hand-written hooks on the whole model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from circuitpress.score.ablation import Mode, ablate
from circuitpress.stream import open_stream
from circuitpress.units import UnitId

from ..whole import divergence, linears, load, tokens

UNITS = {
    "tiny_llama": [
        (UnitId(0, "head", 5), "model.layers.0.self_attn.o_proj", slice(40, 48)),
        (UnitId(1, "kv_group", 1), "model.layers.1.self_attn.o_proj", slice(16, 32)),
        (UnitId(1, "head", 0), "model.layers.1.self_attn.o_proj", slice(0, 8)),
        (UnitId(2, "neuron", 51), "model.layers.2.mlp.down_proj", slice(51, 52)),
    ],
    "tiny_gpt2": [
        (UnitId(2, "head", 1), "transformer.h.2.attn.c_proj", slice(8, 16)),
        (UnitId(0, "kv_group", 4), "transformer.h.0.attn.c_proj", slice(32, 40)),
        (UnitId(0, "neuron", 3), "transformer.h.0.mlp.c_proj", slice(3, 4)),
    ],
}


def whole_ablation(model: Any, ids: Tensor, name: str, columns: slice, mode: str) -> Tensor:
    """KL of every position when the columns of a map's input are set to zero or to their mean over the text."""
    site, seen = linears(model)[name], []
    handle = site.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        clean = model(ids).logits
    handle.remove()
    value = seen[0][..., columns].flatten(0, 1).mean(0) if mode == "mean" else 0.0

    def close(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = args[0].clone()
        x[..., columns] = value
        return (x,)

    handle = site.register_forward_pre_hook(close)
    with torch.no_grad():
        changed = model(ids).logits
    handle.remove()
    return divergence(clean, changed)


@pytest.mark.parametrize("mode", ["zero", "mean"])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_against_hooks_on_the_whole_model(name: str, mode: Mode, request: pytest.FixtureRequest) -> None:
    folder, ids = request.getfixturevalue(name), tokens(5, 8)
    model = load(folder)
    units = [unit for unit, _, _ in UNITS[name]]
    scores = ablate(open_stream(folder, batch_tokens=16), ids, units, mode=mode)
    assert scores.units == tuple(units)
    assert (scores.method, scores.evidence) == (f"{mode}-ablation", "causal")
    for n, (_, site, columns) in enumerate(UNITS[name]):
        kl = whole_ablation(model, ids, site, columns, mode)
        # float32 logits: KL is good to 1e-6, of which the smallest effects here are a thousandfold.
        assert scores.values[n] == pytest.approx(float(kl.mean()), rel=1e-3, abs=2e-6)
        assert scores.stderr[n] == pytest.approx(float(kl.mean(1).std() / 5**0.5), rel=2e-3, abs=2e-6)
    assert scores.values.min() > 1e-5
    assert len(set(np.round(scores.values, 9))) == len(units)


def test_resampled_values_come_from_the_text(tiny_llama: Path) -> None:
    """By hand: one generator, one token drawn for every position of the micro-batch."""
    ids, model = tokens(4, 6), load(tiny_llama)
    unit, name, columns = UNITS["tiny_llama"][0]
    site, seen = linears(model)[name], []
    handle = site.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        clean = model(ids).logits
    handle.remove()
    draw = torch.randint(24, (4, 6), generator=torch.Generator().manual_seed(3))

    def swap(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = args[0].clone()
        x[..., columns] = seen[0].flatten(0, 1)[draw][..., columns]
        return (x,)

    handle = site.register_forward_pre_hook(swap)
    with torch.no_grad():
        expected = float(divergence(clean, model(ids).logits).mean())
    handle.remove()
    scores = ablate(open_stream(tiny_llama), ids, [unit], mode="resample", seed=3)
    assert scores.values[0] == pytest.approx(expected, rel=1e-3)
    other = ablate(open_stream(tiny_llama), ids, [unit], mode="resample", seed=4)
    assert other.values[0] != scores.values[0]


@pytest.mark.parametrize(
    ("unit", "cause"),
    [
        (UnitId(3, "head", 0), "L3.head.0 does not exist: the model has layers 0 to 2"),
        (UnitId(1, "head", 6), "L1.head.6 is not a unit of this block: it has 6 x head, 3 x kv_group, 52 x neuron"),
        (UnitId(1, "expert", 0), "L1.expert.0 is not a unit of this block"),
    ],
)
def test_units_that_do_not_exist(tiny_llama: Path, unit: UnitId, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        ablate(open_stream(tiny_llama), tokens(1, 4), [unit])
