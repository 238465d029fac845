"""Features as a source of Hessians: against autograd through the whole model, feature by feature and token by token."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from circuitpress.errors import CircuitpressError
from circuitpress.features import Importance, price_features, strongest
from circuitpress.mech.sae import Sae
from circuitpress.mech.sites import Site
from circuitpress.price import load_hessians, price, shard_path
from circuitpress.stream import open_stream

from .mech.sae.test_judge import some_sae
from .whole import blocks_of, draw_labels, linears, load, tokens, trace, weight

WIDTH, SKIP = 48, 2
LAYER = 1


def sae() -> Sae:
    return some_sae(WIDTH, Site(LAYER, "resid_post"), skip=SKIP)


def only(feature: int, size: float = 3.0) -> Any:
    """One feature with a weight of its own."""

    def choose(found: Importance) -> Tensor:
        weights = torch.zeros_like(found.closing)
        weights[feature] = size
        return weights

    return choose


@pytest.mark.parametrize("draws", [1, 2])
def test_what_features_cost(tiny_llama: Path, tmp_path: Path, draws: int) -> None:
    """Closing costs and steepness from the gradients of drawn labels; the strongest keep theirs."""
    ids, stream = tokens(5, 9), open_stream(tiny_llama, batch_tokens=18)
    model = load(tiny_llama)
    closing, steep, fires = (torch.zeros(90, dtype=torch.float64) for _ in range(3))
    for draw in range(draws):
        found = trace(model, ids, draw_labels(model(ids).logits.detach(), draw=draw))
        x, g = found.inputs[LAYER + 1][:, SKIP:].double(), found.pulled[LAYER + 1][:, SKIP:].double()
        a = sae().encode(x)[0]
        slope = g @ sae().w_dec.double().T
        closing += 0.5 * (a * slope).square().sum((0, 1)) / (5 * 7 * draws)
        steep += ((a > 0) * slope.square()).sum((0, 1))
        fires += (a > 0).double().sum((0, 1))
    seen: list[Importance] = []

    def choose(one: Importance) -> Tensor:
        seen.append(one)
        return strongest(6)(one)

    scores = price_features(stream, ids, sae(), choose, draws=draws, folder=tmp_path)
    (one,) = seen
    torch.testing.assert_close(one.closing, closing, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(one.steepness, steep / fires.clamp(min=1), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(one.rate, fires / (5 * 7 * draws))
    assert sorted(scores.provenance["features"]) == sorted(closing.topk(6).indices.tolist())


def test_the_hessian_and_the_neurons_next_to_the_site_are_exact(tiny_llama: Path, tmp_path: Path) -> None:
    """Between `down` and the site lies an addition: signs cancel, and every number can be written down."""
    ids, stream, model = tokens(4, 9), open_stream(tiny_llama, batch_tokens=18), load(tiny_llama)
    found = trace(model, ids, ids)
    feature = int((sae().encode(found.inputs[LAYER + 1])[0] > 0).sum((0, 1)).argmax())
    scores = price_features(stream, ids, sae(), only(feature), folder=tmp_path)
    on = (sae().encode(found.inputs[LAYER + 1].double())[0][..., feature] > 0).double()
    on[:, :SKIP] = 0
    direction = sae().w_enc.double()[:, feature]
    name = f"model.layers.{LAYER}.mlp.down_proj"
    z, matrix = found.x[name].double().flatten(0, 1), weight(linears(model)[name])
    s = 3.0 * on.flatten() * direction.square().mean()
    expected = (z * s[:, None]).T @ z / ids.numel()
    place = stream.anatomy.blocks[LAYER]
    hessian = load_hessians(tmp_path, place, stream.device)[name]
    torch.testing.assert_close(hessian.double(), expected, rtol=1e-4, atol=1e-8)
    effect = z * (direction @ matrix)
    cost = 0.5 * 3.0 * (on.flatten()[:, None] * effect.square()).mean(0)
    units = [i for i, unit in enumerate(scores.units) if (unit.layer, unit.kind) == (LAYER, "neuron")]
    np.testing.assert_allclose(scores.values[units], cost.numpy(), rtol=1e-4, atol=1e-12)
    by_name = {str(unit): value for unit, value in zip(scores.units, scores.values, strict=True)}
    shown = [by_name[name] for name in scores.provenance["writers"]]
    assert len(shown) == 32
    assert shown == sorted(shown, reverse=True)
    assert shown[0] >= float(cost.max()) * (1 - 1e-4)
    above = [value for unit, value in zip(scores.units, scores.values, strict=True) if unit.layer > LAYER]
    assert above
    assert not any(above)
    assert not shard_path(tmp_path, LAYER + 1).exists()


def test_below_attention_the_mean_over_signs_is_the_sum_over_tokens(tiny_llama: Path, tmp_path: Path) -> None:
    """For q of block 0 every later token's feature counts by itself: one backward pass for each, against many draws."""
    ids, stream, model = tokens(1, 6), open_stream(tiny_llama), load(tiny_llama)
    name = "model.layers.0.self_attn.q_proj"
    kept: dict[str, Any] = {}
    module = linears(model)[name]
    handles = [module.register_forward_hook(lambda _, args, y: kept.update(x=args[0], y=y))]
    handles += [blocks_of(model)[LAYER].register_forward_hook(lambda _, __, y: kept.update(out=y))]
    model(ids)
    for handle in handles:
        handle.remove()
    out = kept["out"][0] if isinstance(kept["out"], tuple) else kept["out"]
    a = sae().encode(out)[0][0]
    feature = int((a[SKIP:] > 0).sum(0).argmax())
    s = torch.zeros(6, dtype=torch.float64)
    for t in range(SKIP, 6):
        if a[t, feature] > 0:
            (g,) = torch.autograd.grad(a[t, feature], kept["y"], retain_graph=True)
            s += 3.0 * g[0].square().mean(1)
    x = kept["x"][0].detach()
    expected = (x * s[:, None]).T @ x / 6
    price_features(stream, ids, sae(), only(feature), draws=60, folder=tmp_path)
    hessian = load_hessians(tmp_path, stream.anatomy.blocks[0], stream.device)[name].double()
    assert (hessian - expected).norm() < 0.05 * expected.norm()


def test_rounding_takes_them_beside_the_text(tiny_llama: Path, tmp_path: Path) -> None:
    ids, stream = tokens(4, 9), open_stream(tiny_llama)
    price_features(stream, ids, sae(), strongest(20), folder=tmp_path / "features")
    price(stream, ids, formats=("int2g16",), folder=tmp_path / "plain")
    price(stream, ids, formats=("int2g16",), folder=tmp_path / "both", beside=[(tmp_path / "features", 0.5)])
    for place in stream.anatomy.blocks:
        plain, both = (load_hessians(tmp_path / name, place, stream.device) for name in ("plain", "both"))
        there = place.index <= LAYER
        extra = load_hessians(tmp_path / "features", place, stream.device) if there else {}
        for name, hessian in plain.items():
            torch.testing.assert_close(both[name], hessian + 0.5 * extra[name] if there else hessian)


def test_a_site_inside_a_block_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    stream = open_stream(tiny_llama)
    for site in (Site(1, "mlp_out"), Site(0, "resid_pre")):
        with pytest.raises(CircuitpressError, match=r"in the residual stream behind a block") as caught:
            price_features(stream, tokens(2, 5), replace(sae(), site=site), strongest(3), folder=tmp_path)
        assert "L<layer>.resid_post" in str(caught.value.hint)
    assert not list(tmp_path.iterdir())
    below = replace(sae(), site=Site(2, "resid_pre"))
    price_features(stream, tokens(2, 5), below, strongest(3), folder=tmp_path / "pre")
    price_features(stream, tokens(2, 5), sae(), strongest(3), folder=tmp_path / "post")
    names = [sorted(path.read_bytes() for path in (tmp_path / name).iterdir()) for name in ("pre", "post")]
    assert names[0] == names[1]  # one place under two names


def test_shards_say_what_others_read(tiny_llama: Path, tmp_path: Path) -> None:
    price_features(open_stream(tiny_llama), tokens(2, 5), sae(), strongest(3), folder=tmp_path)
    from safetensors import safe_open

    with safe_open(shard_path(tmp_path, 0), framework="np") as file:
        assert json.loads(file.metadata()["notes"]) == {}
