"""Where two models with one tokenizer part: layer by layer, on the same text, each model fed by its own states.

Both walk up side by side, one block of each resident. Above every block:

- states: |x - x'| / |x| and the cosine, means over tokens;
- logit lens: KL(p || p') and agreement of the first choice, where p is what the model would predict if it stopped here
  (norm and lm_head of its own);
- attention: for every head the total variation between the two patterns, 1/2 sum_k |a_qk - a'_qk|, the mean over
  queries: 0 for the same pattern, 1 for patterns that share no key.

States and lens say that something differs, not that it matters: what the models do differently is measured by KL and
by behaviors. Attention is compared where the two models have the same number of heads in a layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..console import Advance, ignore
from ..errors import CircuitpressError
from ..mech.lens.attention import weights
from ..stream import Stream

LENS_CHUNK = 1 << 22
"""Logits that exist at a time."""


@dataclass(frozen=True)
class LayerDrift:
    """The two models above `blocks` blocks (0: embeddings)."""

    blocks: int
    difference: float
    cosine: float
    lens_kl: float
    """Nats per token."""
    lens_agreement: float


@dataclass(frozen=True)
class HeadDrift:
    """The mean total variation between the patterns of one head, 0 to 1."""

    layer: int
    head: int
    distance: float


@dataclass(frozen=True)
class Drift:
    """What `drift` found; `heads` is empty for layers whose numbers of heads differ."""

    layers: tuple[LayerDrift, ...]
    heads: tuple[HeadDrift, ...]
    tokens: int


@torch.no_grad()
def drift(reference: Stream, model: Stream, windows: Tensor, *, advance: Advance = ignore) -> Drift:
    """Walks `windows` int64 [n, length] through both models. CircuitpressError if they have other depths or widths."""
    a, b = reference.anatomy, model.anatomy
    if (len(a.blocks), a.hidden, a.vocab) != (len(b.blocks), b.hidden, b.vocab):
        shapes = [f"{len(x.blocks)} blocks, hidden size {x.hidden}, vocabulary {x.vocab}" for x in (a, b)]
        raise CircuitpressError(
            f"layers cannot be compared one by one: {' against '.join(shapes)}",
            hint="behaviors and text can: leave drift out",
        )
    # One micro-batch for both: their own sizes may differ.
    batches = reference.batches(windows)
    states = [(reference.embed(ids), model.embed(ids)) for ids in batches]
    layers = [_layer(0, reference, model, states)]
    heads: list[HeadDrift] = []
    for index in range(reference.depth):
        with reference.block(index) as first, model.block(index) as second:
            if a.blocks[index].heads == b.blocks[index].heads:
                heads += _heads(index, reference, model, first, second, states)
            states = [(reference.run(index, first, x), model.run(index, second, y)) for x, y in states]
        layers.append(_layer(index + 1, reference, model, states))
        advance(1, f"block {index}")
    return Drift(tuple(layers), tuple(heads), windows.numel())


def _layer(blocks: int, reference: Stream, model: Stream, states: list[tuple[Tensor, Tensor]]) -> LayerDrift:
    total = torch.zeros(4, dtype=torch.float64)
    tokens = 0
    for x, y in states:
        x, y = x.flatten(0, 1), y.flatten(0, 1).to(x.device)
        tokens += len(x)
        total[0] += float(((x - y).float().norm(dim=1) / x.float().norm(dim=1).clamp(min=1e-9)).sum())
        total[1] += float(nn.functional.cosine_similarity(x.float(), y.float(), dim=1).sum())
        step = max(1, LENS_CHUNK // reference.anatomy.vocab)
        for p, q in zip(x.split(step), y.split(step), strict=True):
            first, second = reference.logits(p), model.logits(q).to(p.device)
            kl = nn.functional.kl_div(second.log_softmax(-1), first.log_softmax(-1), reduction="sum", log_target=True)
            total[2] += float(kl)
            total[3] += int((first.argmax(-1) == second.argmax(-1)).sum())
    difference, cosine, kl, agreement = (total / tokens).tolist()
    return LayerDrift(blocks, difference, cosine, kl, agreement)


def _heads(
    index: int, reference: Stream, model: Stream, first: nn.Module, second: nn.Module,
    states: list[tuple[Tensor, Tensor]],
) -> list[HeadDrift]:  # fmt: skip
    pattern: Callable[[Stream, nn.Module, Tensor], Tensor] = lambda s, m, x: weights(s, index, m, x)  # noqa: E731
    total = torch.zeros(reference.anatomy.blocks[index].heads, dtype=torch.float64)
    rows = 0
    for x, y in states:
        # Window by window: patterns of a batch would be the largest tensor of the walk.
        for own, other in zip(x.split(1), y.split(1), strict=True):
            distance = pattern(reference, first, own) - pattern(model, second, other).to(own.device)
            total += (0.5 * distance.abs().sum(-1)).mean(-1)[0].double().cpu()
            rows += 1
    return [HeadDrift(index, head, value) for head, value in enumerate((total / rows).tolist())]
