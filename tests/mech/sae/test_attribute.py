"""Contributions of features: exact sums in float64, completeness of the path, and the interventions themselves."""

from pathlib import Path

import pytest
import torch

from circuitpress.mech.flow import text_loss
from circuitpress.mech.sae.attribute import closed, first_order, integrated, split
from circuitpress.mech.sites import Site, walk
from circuitpress.stream import open_stream

from ...conftest import Build
from ...whole import load, tokens
from ..test_sites import module_of, whole_site
from .test_judge import losses, some_sae
from .test_value import D, random_sae


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("by_norm", [False, True])
def test_the_account_is_exact(architecture: str, normalisation: str, by_norm: bool) -> None:
    """features + bias + error = g . x, to the precision of float64."""
    if by_norm and architecture != "topk":
        by_norm = False
    sae = random_sae(architecture, normalisation=normalisation, by_decoder_norm=by_norm)
    g = torch.Generator().manual_seed(7)
    x, gradient = (torch.randn(4, 9, D, dtype=torch.float64, generator=g) * 3 for _ in range(2))
    features, bias, error = split(sae, x, gradient)
    total = features.sum(-1) + bias + error
    torch.testing.assert_close(total, (gradient * x).sum(-1), rtol=1e-13, atol=1e-12)
    # One feature by its definition: what the reconstruction loses without it.
    a, frame = sae.encode(x)
    without = a.clone()
    without[..., 5] = 0
    lost = sae.decode(a, frame) - sae.decode(without, frame)
    torch.testing.assert_close(features[..., 5], (gradient * lost).sum(-1), rtol=1e-9, atol=1e-10)
    assert bool((features[a == 0] == 0).all())


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_first_order_sums_to_the_gradient_times_the_activation(name: str, request: pytest.FixtureRequest) -> None:
    folder, ids = request.getfixturevalue(name), tokens(4, 6)
    stream = open_stream(folder, batch_tokens=12)
    batches, site = stream.batches(ids), Site(1, "resid_post")
    sae = some_sae(stream.anatomy.hidden, site, skip=0)
    found = first_order(stream, batches, sae, text_loss(stream, batches))
    model = load(folder)
    kept = []
    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h

    def keep(_: object, args: tuple[torch.Tensor, ...]) -> None:
        args[0].retain_grad()
        kept.append(args[0])

    handle = blocks[2].register_forward_pre_hook(keep)
    logits = model(ids).logits
    handle.remove()
    (-losses_sum(logits, ids)).backward()
    expected = float((kept[0].grad * kept[0].detach()).sum())
    assert float(found.features.sum()) + found.bias + found.error == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert found.evidence == "gradient"


def losses_sum(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The sum of next-token losses."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def test_closing_features_against_hooks_on_the_whole_model(tiny_llama: Path) -> None:
    stream, ids, site = open_stream(tiny_llama, batch_tokens=12), tokens(4, 6), Site(0, "mlp_out")
    batches, sae = stream.batches(ids), some_sae(48, site, skip=1)
    model = load(tiny_llama, torch.float32)
    x = whole_site(model, ids, site)
    a, _ = sae.encode(x)
    chosen = a[:, 1:].flatten(0, 1).sum(0).argsort(descending=True)[:3].tolist()
    found = closed(stream, batches, sae, text_loss(stream, batches), chosen)
    clean = losses(model(ids).logits.detach(), ids)
    for value, feature in zip(found.tolist(), chosen, strict=True):
        change = a[..., feature, None] * sae.w_dec[feature]
        change[:, 0] = 0

        def subtract(_: object, __: object, out: torch.Tensor, change: torch.Tensor = change) -> torch.Tensor:
            return out - change

        handle = module_of(model, 0, "down").register_forward_hook(subtract)
        with torch.no_grad():
            without = losses(model(ids).logits, ids)
        handle.remove()
        assert value == pytest.approx((clean - without) * 4 * 5, rel=1e-2, abs=1e-3)


def test_integrated_contributions_are_complete_and_better_than_first_order(tiny_llama: Path) -> None:
    """With more points the rule's gap vanishes; g . x at one end misses far more of the difference."""
    stream, ids, site = open_stream(tiny_llama), tokens(3, 6), Site(0, "resid_post")
    batches, sae = stream.batches(ids), some_sae(48, site, k=30, skip=0)
    objective = text_loss(stream, batches)
    once = first_order(stream, batches, sae, objective)
    found = {steps: integrated(stream, batches, sae, objective, steps=steps) for steps in (2, 10, 60)}
    gaps = {steps: abs(row.gap or 0.0) for steps, row in found.items()}
    ends = float(found[60].features.sum()) + (found[60].gap or 0.0)
    assert gaps[60] < 0.02 * abs(ends)
    assert gaps[60] < gaps[2]
    assert abs(float(once.features.sum()) - ends) > 5 * gaps[10]


def test_in_the_saturated_regime_the_first_order_misleads(build_checkpoint: Build) -> None:
    """A sharp softmax at the end: closing the feature that carries the answer costs nats, its gradient says next to
    nothing; the path sees it."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=97, hidden_size=24, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=12, max_position_embeddings=32, initializer_range=0.5,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, dtype="float32",
    )  # fmt: skip
    stream = open_stream(build_checkpoint("saturated", config))
    ids, site = tokens(2, 5), Site(0, "resid_post")
    batches, sae = stream.batches(ids), some_sae(24, site, latents=40, k=6, skip=0)

    def objective(_: int, hidden: torch.Tensor) -> torch.Tensor:
        """Log-probability of the model's own top token, sharpened: saturated at 0 where the model is."""
        logits = 40 * stream.logits(hidden)
        top = stream.logits(clean).argmax(-1)
        return logits.log_softmax(-1).gather(-1, top[..., None])[..., 0].sum(1)

    clean = walk(stream, batches, lambda i, m, _, h: stream.run(i, m, h)).get((1, 0))
    once = first_order(stream, batches, sae, objective).features
    path = integrated(stream, batches, sae, objective, steps=40).features
    chosen = path.abs().argsort(descending=True)[:12].tolist()
    exact = -closed(stream, batches, sae, objective, chosen)

    def correlation(estimate: torch.Tensor) -> float:
        return float(torch.corrcoef(torch.stack([estimate[chosen], exact]))[0, 1])

    missed = exact / once[chosen].abs().clamp(min=1e-30)
    assert bool(((exact > 1) & (missed > 1000)).any())  # 69 nats, of which the gradient sees 0.002
    seen = exact / path[chosen].abs().clamp(min=1e-30)
    assert float(seen[exact > 1].max()) < 20
    assert correlation(path) > 0.6
