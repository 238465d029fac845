"""Gradients at sites against torch.autograd through the whole model in transformers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from circuitpress.behaviors import Pairs
from circuitpress.mech.flow import flows, logit_difference, text_loss
from circuitpress.mech.sites import NAMES, Site, SiteName
from circuitpress.stream import open_stream

from ..whole import load, tokens
from .test_sites import module_of


def whole_gradient(folder: Path, ids: Tensor, site: Site, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Gradient of minus the sum of next-token losses at a site whose value is raised by `shift`; the losses [n]."""
    model = load(folder)
    layer = site.layer + (site.name == "resid_post")
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        x = x + shift
        x.retain_grad()
        kept.append(x)
        return x

    if site.name in ("resid_pre", "resid_post"):
        block = (model.model.layers if hasattr(model, "model") else model.transformer.h)[layer]
        handle = block.register_forward_pre_hook(lambda _, args: (keep(args[0]), *args[1:]))
    else:
        module = module_of(model, site.layer, "o" if site.name in ("head_out", "attn_out") else "down")
        if site.name in ("head_out", "neurons"):
            handle = module.register_forward_pre_hook(lambda _, args: (keep(args[0]),))
        else:
            handle = module.register_forward_hook(lambda _, __, out: keep(out))
    logits = model(ids).logits[:, :-1]
    handle.remove()
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").sum(1)
    (-loss.sum()).backward()
    assert kept[0].grad is not None
    return kept[0].grad, -loss.detach()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("checkpoint", ["tiny_llama", "tiny_gpt2"])
def test_gradient_and_values_at_every_site(name: SiteName, checkpoint: str, request: pytest.FixtureRequest) -> None:
    """Two points side by side, of which one is not where the model is; two micro-batches."""
    folder, ids, site = request.getfixturevalue(checkpoint), tokens(3, 6), Site(1, name)
    stream = open_stream(folder, batch_tokens=12)
    batches = stream.batches(ids)
    points = [lambda _, x: x, lambda _, x: x + 0.05]
    found = flows(stream, batches, site, text_loss(stream, batches), points)
    for flow, shift in zip(found, (0.0, 0.05), strict=True):
        gradient, values = whole_gradient(folder, ids, site, shift)
        torch.testing.assert_close(torch.cat(flow.g).double(), gradient, rtol=2e-3, atol=2e-4)
        torch.testing.assert_close(torch.cat(flow.values).double(), values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(found[1].x), torch.cat(found[0].x) + 0.05)
    assert float(torch.cat(found[0].g).abs().max()) > 0.01


def test_logit_difference_is_read_at_each_pairs_position(tiny_llama: Path) -> None:
    stream, ids = open_stream(tiny_llama, batch_tokens=8), tokens(5, 7)
    position, answer, wrong = torch.tensor([6, 3, 4, 6, 2]), torch.arange(5) + 3, torch.arange(5) + 40
    batches, objective = logit_difference(stream, Pairs(ids, ids, position, answer, wrong))
    found = flows(stream, batches, Site(0, "resid_post"), objective, gradients=False)[0]
    logits = load(tiny_llama)(ids).logits[torch.arange(5), position]
    expected = logits[torch.arange(5), answer] - logits[torch.arange(5), wrong]
    assert len(batches) > 1
    assert not found.g
    torch.testing.assert_close(torch.cat(found.values).double(), expected.detach(), rtol=1e-4, atol=1e-4)
