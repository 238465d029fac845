"""OV and QK circuits against dense products in float64, from the state dict and with grouped heads by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from circuitpress.mech.lens.spectra import HeadWeights, spectra
from circuitpress.stream import open_stream

from ...whole import load


def dense(folder: Path) -> tuple[list[list[tuple[Tensor, Tensor]]], Tensor, Tensor]:
    """OV and QK [d, d] of every head by layer, the embedding and the unembedding, all float64."""
    model = load(folder)
    layers = []
    if hasattr(model, "transformer"):
        for block in model.transformer.h:
            d, heads = 40, 5
            centre = torch.eye(d, dtype=torch.float64) - 1 / d
            fused = block.attn.c_attn.weight.detach().T @ torch.diag(block.ln_1.weight.detach()) @ centre
            q, k, v = fused.split(d)
            o = block.attn.c_proj.weight.detach().T
            spans = [slice(8 * h, 8 * h + 8) for h in range(heads)]
            layers.append([(o[:, s] @ v[s], q[s].T @ k[s]) for s in spans])
        return layers, model.transformer.wte.weight.detach(), model.lm_head.weight.detach()
    for block in model.model.layers:
        gain = torch.diag(block.input_layernorm.weight.detach())
        a = block.self_attn
        q, k, v = (m.weight.detach() @ gain for m in (a.q_proj, a.k_proj, a.v_proj))
        o, rows = a.o_proj.weight.detach(), []
        for head in range(6):
            own, kv = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
            rows.append((o[:, own] @ v[kv], q[own].T @ k[kv]))
        layers.append(rows)
    return layers, model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach()


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_against_dense_products(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    layers, embed, unembed = dense(folder)
    found = spectra(open_stream(folder))
    assert len(found.heads) == sum(len(heads) for heads in layers)
    for row in found.heads:
        ov, qk = layers[row.layer][row.head]
        np.testing.assert_allclose(row.ov, torch.linalg.svdvals(ov)[:8].numpy(), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(row.qk, torch.linalg.svdvals(qk)[:8].numpy(), rtol=1e-4, atol=1e-6)
        values = torch.linalg.eigvals(unembed @ ov @ embed.T)
        assert row.copying == pytest.approx(float(values.real.sum() / values.abs().sum()), abs=1e-4)
    assert len(found.pairs) == 3 * len(layers[0]) ** 2
    for pair in found.pairs[::7]:
        (writer, _), (ov, qk) = layers[pair.writer[0]][pair.writer[1]], layers[pair.reader[0]][pair.reader[1]]
        assert pair.writer[0] < pair.reader[0]
        for value, matrix in ((pair.q, qk.T), (pair.k, qk), (pair.v, ov)):
            expected = (matrix @ writer).norm() / (matrix.norm() * writer.norm())
            assert value == pytest.approx(float(expected), rel=1e-4)


def test_effective_directions() -> None:
    assert HeadWeights.effective(np.array([3.0, 0.0, 0.0])) == 1
    assert HeadWeights.effective(np.array([2.0, 2.0, 2.0])) == pytest.approx(3)
    assert HeadWeights.effective(np.zeros(4)) == 0
