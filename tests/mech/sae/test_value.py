"""Encoding and decoding against a plain loop over features in float64."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from circuitpress.mech.sae import Sae
from circuitpress.mech.sites import Site

D, N = 7, 11


def random_sae(architecture: str = "topk", *, seed: int = 0, **extra: Any) -> Sae:
    """An SAE of odd sizes with biases, thresholds and decoder rows of different norms."""
    g = torch.Generator().manual_seed(seed)
    w_enc, b_enc, w_dec, b_dec = (torch.randn(*shape, generator=g) for shape in ((D, N), (N,), (N, D), (D,)))
    if architecture == "topk":
        extra = {"k": 3} | extra
    if architecture == "jumprelu":
        extra = {"threshold": torch.rand(N, generator=g) * 2} | extra
    return Sae(w_enc, b_enc, w_dec, b_dec, architecture, site=Site(1, "resid_post"), **extra)  # pyright: ignore


def by_hand(sae: Sae, x: np.ndarray) -> np.ndarray:
    """x^ of one token, one feature at a time."""
    w_enc, b_enc, w_dec, b_dec = (t.double().numpy() for t in (sae.w_enc, sae.b_enc, sae.w_dec, sae.b_dec))
    shift, scale, small = 0.0, 1.0, 0.0
    if sae.normalisation == "layer_norm":
        shift = x.mean()
        scale, small = math.sqrt(((x - shift) ** 2).sum() / (D - 1)), 1e-5
    elif sae.normalisation == "constant_norm_rescale":
        scale = math.sqrt((x**2).sum()) / math.sqrt(D)
    z = (x - shift) / (scale + small)
    pre = [sum((z[i] - b_dec[i] * sae.subtract_bias) * w_enc[i, f] for i in range(D)) + b_enc[f] for f in range(N)]
    norms = [math.sqrt((w_dec[f] ** 2).sum()) if sae.by_decoder_norm else 1.0 for f in range(N)]
    pre = [p * norm for p, norm in zip(pre, norms, strict=True)]
    order = sorted(range(N), key=lambda f: -pre[f])
    out = b_dec.copy()
    for f in range(N):
        on = pre[f] > 0
        if sae.architecture == "topk":
            on = on and f in order[: sae.k]
        if sae.threshold is not None:
            on = on and pre[f] > float(sae.threshold[f])
        if on:
            out += pre[f] * w_dec[f] / norms[f]
    return out * scale + shift


@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
@pytest.mark.parametrize("subtract", [True, False])
def test_reconstruction(architecture: str, normalisation: str, subtract: bool) -> None:
    sae = random_sae(architecture, normalisation=normalisation, subtract_bias=subtract)
    x = torch.randn(2, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = np.stack([by_hand(sae, row) for row in x.flatten(0, 1).numpy()])
    np.testing.assert_allclose(sae.reconstruct(x).flatten(0, 1).numpy(), expected, rtol=1e-9, atol=1e-9)


def test_topk_by_decoder_norm() -> None:
    sae = random_sae(by_decoder_norm=True)
    x = torch.randn(20, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = np.stack([by_hand(sae, row) for row in x.numpy()])
    np.testing.assert_allclose(sae.reconstruct(x).numpy(), expected, rtol=1e-9, atol=1e-9)
    plain = replace(sae, by_decoder_norm=False)
    assert not torch.equal(sae.encode(x)[0] > 0, plain.encode(x)[0] > 0)


def test_bfloat16_is_computed_in_float32() -> None:
    sae = random_sae()
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert sae.encode(x)[0].dtype == torch.float32
    assert sae.reconstruct(x).dtype == torch.bfloat16
    torch.testing.assert_close(sae.encode(x)[0], sae.encode(x.float())[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b_dec": torch.zeros(N)}, "b_dec is"),
        ({"w_dec": torch.zeros(D, N)}, "w_dec is"),
        ({"architecture": "jumprelu", "k": None}, "threshold is missing"),
        ({"k": None}, "topk, and only topk, has a k"),
    ],
)
def test_parts_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(random_sae(), **change)
