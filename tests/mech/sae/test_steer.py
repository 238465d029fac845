"""Steering against a hook on the whole model."""

from pathlib import Path

import pytest
import torch

from circuitpress.behaviors import Pairs
from circuitpress.mech.flow import logit_difference
from circuitpress.mech.sae.steer import logit_change, steer
from circuitpress.mech.sites import Site
from circuitpress.stream import open_stream

from ...whole import divergence, load, tokens
from ..test_sites import module_of


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_against_a_hook(name: str, request: pytest.FixtureRequest) -> None:
    folder, ids = request.getfixturevalue(name), tokens(5, 6)
    model, stream = load(folder, torch.float32), open_stream(folder, batch_tokens=12)
    direction = torch.randn(stream.anatomy.hidden, generator=torch.Generator().manual_seed(4))
    rows = steer(stream, ids, Site(1, "attn_out"), direction, [0.0, 2.0, -1.0])
    with torch.no_grad():
        clean = model(ids).logits
    for row in rows:
        handle = module_of(model, 1, "o").register_forward_hook(lambda _, __, out, a=row.alpha: out + a * direction)
        with torch.no_grad():
            changed = model(ids).logits
        handle.remove()
        assert row.kl == pytest.approx(float(divergence(clean, changed).mean()), rel=1e-3, abs=1e-6)
        expected = (changed.log_softmax(-1) - clean.log_softmax(-1)).double().mean((0, 1))
        torch.testing.assert_close(torch.from_numpy(row.change), expected, rtol=1e-3, atol=1e-4)
    assert rows[0].kl == pytest.approx(0, abs=1e-6)
    assert rows[0].top1_agreement == 1
    assert rows[1].kl > 1e-3 < rows[1].control_kl != rows[1].kl


def test_a_direction_of_the_unembedding_raises_its_logit(tiny_llama: Path) -> None:
    """Adding what lm_head reads for the answer, at the end of the last block."""
    stream, ids = open_stream(tiny_llama, batch_tokens=12), tokens(4, 6)
    ends = torch.full((4,), 5)
    pairs = Pairs(ids, ids, ends, torch.full((4,), 11), torch.full((4,), 30))
    batches, objective = logit_difference(stream, pairs)
    head = stream.outer_weight("lm_head")
    change = logit_change(stream, batches, Site(2, "resid_post"), head[11] - head[30], [0.0, 0.5, 1.0], objective)
    assert change.shape == (3, 4)
    assert abs(change[0]).max() < 1e-5
    assert (change[1] > 0).all()
    model = load(tiny_llama)
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: (args[0] + (head[11] - head[30]).double(),))
    steered = model(ids).logits[:, -1]
    handle.remove()
    clean = model(ids).logits[:, -1]
    expected = (steered - clean)[:, 11] - (steered - clean)[:, 30]
    torch.testing.assert_close(torch.from_numpy(change[2]), expected.detach(), rtol=1e-3, atol=1e-4)
