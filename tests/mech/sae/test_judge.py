"""Splicing an SAE into a model, against the whole model in transformers with a hook."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from circuitpress.errors import CircuitpressError
from circuitpress.mech.sae import Sae
from circuitpress.mech.sae.judge import judge
from circuitpress.mech.sites import Site
from circuitpress.stream import open_stream

from ...whole import divergence, load, tokens
from ..test_sites import module_of, whole_site


def some_sae(width: int, site: Site, *, latents: int = 90, k: int = 9, skip: int = 1, seed: int = 0) -> Sae:
    """Random directions with a tied encoder: a poor SAE, but one that reconstructs something."""
    g = torch.Generator().manual_seed(seed)
    w_dec = torch.nn.functional.normalize(torch.randn(latents, width, generator=g), dim=1)
    return Sae(w_dec.T.clone(), torch.zeros(latents), w_dec, torch.zeros(width), "topk", k=k, site=site, skip=skip)


def losses(logits: Tensor, ids: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("skip", [0, 2])
def test_every_figure_by_hand(name: str, skip: int, request: pytest.FixtureRequest) -> None:
    folder, ids = request.getfixturevalue(name), tokens(5, 8)
    model, stream = load(folder, torch.float32), open_stream(folder, batch_tokens=16)
    site = Site(1, "mlp_out")
    sae = some_sae(stream.anatomy.hidden, site, skip=skip)
    x = whole_site(model, ids, site)
    rows = x[:, skip:].flatten(0, 1).double()
    reconstruction = sae.reconstruct(x)
    quality = judge(stream, ids, sae)
    assert quality.tokens == 5 * (8 - skip)
    error = (reconstruction[:, skip:].flatten(0, 1).double() - rows).square().sum()
    assert quality.fvu == pytest.approx(float(error / (rows - rows.mean(0)).square().sum()), rel=1e-4)
    fired = sae.encode(rows)[0] > 0
    assert quality.l0 == pytest.approx(float(fired.sum(1).double().mean()), rel=1e-6)
    assert quality.dead_share == pytest.approx(float((~fired.any(0)).double().mean()))

    module = module_of(model, 1, "down")
    found: dict[str, Tensor] = {"clean": model(ids).logits.detach()}
    replaced = {"sae": reconstruction, "zero": torch.zeros_like(x), "mean": rows.mean(0).float().expand_as(x)}
    for label, value in replaced.items():

        def splice(_: object, __: object, out: Tensor, value: Tensor = value) -> Tensor:
            return torch.cat([out[:, :skip], value[:, skip:]], 1)

        handle = module.register_forward_hook(splice)
        with torch.no_grad():
            found[label] = model(ids).logits
        handle.remove()
        assert getattr(quality, f"ce_{label}") == pytest.approx(losses(found[label], ids), rel=1e-4)
        kl = float(divergence(found["clean"], found[label]).mean())
        assert getattr(quality, f"kl_{label}") == pytest.approx(kl, rel=1e-3)
    clean, spliced, zero, mean = (losses(found[key], ids) for key in ("clean", "sae", "zero", "mean"))
    assert quality.loss_recovered == pytest.approx((zero - spliced) / (zero - clean), rel=1e-2)
    assert quality.loss_recovered_from_mean == pytest.approx((mean - spliced) / (mean - clean), rel=1e-2)
    document = quality.to_json()
    assert {"fvu", "loss_recovered", "kl_score", "evidence"} <= set(document)
    assert "loss_recovered" in document["evidence"]["causal"]
    assert "fvu" in document["evidence"]["correlational"]


def test_a_perfect_sae_loses_nothing(tiny_llama: Path) -> None:
    """Features for plus and minus every axis, all of them used: the identity."""
    stream, ids = open_stream(tiny_llama), tokens(3, 6)
    axes = torch.cat([torch.eye(48), -torch.eye(48)])
    sae = Sae(axes.T.clone(), torch.zeros(96), axes, torch.zeros(48), "standard", site=Site(0, "resid_post"))
    quality = judge(stream, ids, sae)
    assert quality.fvu < 1e-10
    assert abs(quality.kl_sae) < 1e-6
    assert quality.loss_recovered == pytest.approx(1, abs=1e-5)
    assert quality.kl_score == pytest.approx(1, abs=1e-5)


def test_an_sae_of_another_width_or_without_a_site(tiny_llama: Path) -> None:
    stream = open_stream(tiny_llama)
    with pytest.raises(CircuitpressError, match="reads 40 numbers per token, L0.mlp_out of .* has 48"):
        judge(stream, tokens(1, 4), some_sae(40, Site(0, "mlp_out")))
    with pytest.raises(CircuitpressError, match="does not say which site"):
        judge(stream, tokens(1, 4), replace(some_sae(48, Site(0, "mlp_out")), site=None))
