"""Norms and shares of the residual stream against hooks on the whole model; the shares are a full account."""

import pytest
import torch

from circuitpress.mech.lens.residual import residual
from circuitpress.mech.sites import Site
from circuitpress.stream import open_stream

from ...whole import load, tokens
from ..test_sites import whole_site


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_against_hooks(name: str, request: pytest.FixtureRequest) -> None:
    folder, ids = request.getfixturevalue(name), tokens(5, 7)
    model = load(folder)
    rows = residual(open_stream(folder, batch_tokens=14), ids)
    parts = {"embedding": whole_site(model, ids, Site(0, "resid_pre"))}
    for layer in range(3):
        parts |= {f"L{layer}.{site}": whole_site(model, ids, Site(layer, site)) for site in ("attn_out", "mlp_out")}
    final = sum(parts.values())
    assert [row.part for row in rows] == list(parts)
    before = torch.zeros_like(final)
    for row in rows:
        x = parts[row.part].detach()
        assert row.norm == pytest.approx(float(x[:, 1:].norm(dim=-1).mean()), rel=1e-3)
        assert row.first_norm == pytest.approx(float(x[:, 0].norm(dim=-1).mean()), rel=1e-3)
        assert row.stream_norm == pytest.approx(float(before[:, 1:].norm(dim=-1).mean()), rel=1e-3)
        share = ((x * final).sum(-1) / final.square().sum(-1)).mean()
        assert row.share == pytest.approx(float(share), rel=1e-2, abs=1e-4)
        cosine = torch.nn.functional.cosine_similarity(x, before, dim=-1)[:, 1:].mean()
        assert row.cosine == pytest.approx(float(cosine), rel=1e-2, abs=1e-4)
        before = before + x
    assert sum(row.share for row in rows) == pytest.approx(1, abs=1e-5)
