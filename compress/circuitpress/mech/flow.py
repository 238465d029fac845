"""Gradients of an objective at a site, at the activations that are there or at any others put in their place.

1. The token ids are walked up to the site's block.
2. For every point (a set of activations to put at the site) the blocks above are run, the objective and its gradient at
   the final hidden states are taken, and the gradient is pulled back down by recomputing block by block.

Points are walked side by side while a block is resident, so that integrating along a path of m points reads the weights
twice, not 2 m times, and at most one block is in memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..behaviors import Pairs
from ..console import Advance, ignore
from ..store import Store
from ..stream import Stream
from .sites import Site, read, rewriting, walk

Objective = Callable[[int, Tensor], Tensor]
"""Micro-batch b and its final hidden states [batch, length, hidden] to values [batch, ...] a sequence; differentiable,
and it is the sum of all values that gets differentiated."""

Point = Callable[[int, Tensor], Tensor]
"""Micro-batch b and the activations [batch, length, width] that are there to those to put in their place."""


@dataclass(frozen=True)
class Flow:
    """What passed through a site at one point, for each micro-batch.

    `x` are the activations put there, `g` the gradient of the sum of the objective at them (both [batch, length,
    width]; `g` is empty if it was not asked for), `values` the objective's values for each sequence [batch].
    """

    x: tuple[Tensor, ...]
    g: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


def text_loss(stream: Stream, batches: Sequence[Tensor]) -> Objective:
    """The negative sum of next-token losses in nats: what the model gains from its activations on this text."""

    def objective(b: int, hidden: Tensor) -> Tensor:
        logits = stream.logits(hidden[:, :-1])
        labels = batches[b][:, 1:].to(logits.device)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return -loss.view(labels.shape).sum(1)

    return objective


def logit_difference(stream: Stream, pairs: Pairs) -> tuple[list[Tensor], Objective]:
    """The clean prompts of a behavior in micro-batches, and logit[answer] - logit[wrong] where it is read."""
    batches = stream.batches(pairs.clean)
    sizes = [len(ids) for ids in batches]
    position, answer, wrong = (t.split(sizes) for t in (pairs.position, pairs.answer, pairs.wrong))

    def objective(b: int, hidden: Tensor) -> Tensor:
        logits = stream.logits(hidden[torch.arange(len(hidden)), position[b].to(hidden.device)])
        tokens = torch.stack([answer[b], wrong[b]], 1).to(logits.device)
        chosen = logits.gather(1, tokens)
        return chosen[:, 0] - chosen[:, 1]

    return batches, objective


def there(_: int, x: Tensor) -> Tensor:
    """The point at which the model is: nothing is changed."""
    return x


def flows(
    stream: Stream,
    batches: Sequence[Tensor],
    site: Site,
    objective: Objective,
    points: Sequence[Point] = (there,),
    *,
    gradients: bool = True,
    advance: Advance = ignore,
) -> list[Flow]:
    """One `Flow` for every point, on micro-batches int64 [batch, length] of token ids."""
    site.width(stream.anatomy)
    inputs = walk(stream, batches, lambda i, module, _, h: stream.run(i, module, h), depth=site.layer, advance=advance)
    keys = [(p, b) for p in range(len(points)) for b in range(len(batches))]
    states, placed = stream.store("flow"), stream.store("points")
    try:
        _up(stream, site, points, keys, inputs, states, placed, advance)
        values, pulled = _objectives(stream, objective, keys, states, gradients)
        if gradients:
            _down(stream, site, keys, inputs, states, placed, pulled, advance)
        per = range(len(batches))
        return [
            Flow(
                tuple(placed.get((p, b), stream.device) for b in per),
                tuple(pulled[p, b] for b in per) if gradients else (),
                tuple(values[p, b] for b in per),
            )
            for p in range(len(points))
        ]
    finally:
        for store in (inputs, states, placed):
            store.clear()


@torch.no_grad()
def _up(
    stream: Stream, site: Site, points: Sequence[Point], keys: Sequence[tuple[int, int]], inputs: Store, states: Store,
    placed: Store, advance: Advance,
) -> None:  # fmt: skip
    """Runs the blocks from the site's own; `states` gets the output of block i under (i + 1, p, b)."""
    for index in range(site.layer, stream.depth):
        with stream.block(index) as module:
            for p, b in keys:
                if index > site.layer:
                    output = stream.run(index, module, states.get((index, p, b), stream.device))
                else:
                    hidden = inputs.get((index, b), stream.device)
                    before, _ = read(stream, index, module, hidden, [site.name])
                    value = points[p](b, before[site.name])
                    placed.put((p, b), value)
                    with rewriting(stream, index, module, site.name, lambda _, value=value: value):
                        output = stream.run(index, module, hidden)
                states.put((index + 1, p, b), output)
        advance(1, f"block {index}")


def _objectives(
    stream: Stream, objective: Objective, keys: Sequence[tuple[int, int]], states: Store, gradients: bool
) -> tuple[dict[tuple[int, int], Tensor], dict[tuple[int, int], Tensor]]:
    """The objective of each sequence, and the gradient of their sum at the final hidden states."""
    values, pulled = {}, {}
    for p, b in keys:
        leaf = states.get((stream.depth, p, b), stream.device).detach().requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            value = objective(b, leaf)
        if gradients:
            (pulled[p, b],) = torch.autograd.grad(value.sum(), leaf)
        values[p, b] = value.detach()
    return values, pulled


def _down(
    stream: Stream, site: Site, keys: Sequence[tuple[int, int]], inputs: Store, states: Store, placed: Store,
    pulled: dict[tuple[int, int], Tensor], advance: Advance,
) -> None:  # fmt: skip
    """Pulls gradients in place from the final hidden states down to the site."""
    for index in reversed(range(site.layer, stream.depth)):
        with stream.block(index) as module:
            for p, b in keys:
                own = index == site.layer
                source = placed.get((p, b), stream.device) if own else states.get((index, p, b), stream.device)
                leaf = source.detach().requires_grad_(True)
                with torch.enable_grad():
                    if own:
                        hidden = inputs.get((index, b), stream.device)
                        output = _through(stream, site, module, hidden, leaf)
                    else:
                        output = stream.run(index, module, leaf)
                    (pulled[p, b],) = torch.autograd.grad(output, leaf, pulled[p, b])
        advance(1, f"block {index}")


def _through(stream: Stream, site: Site, module: nn.Module, hidden: Tensor, leaf: Tensor) -> Tensor:
    """The output of the site's block with `leaf` at the site."""
    with rewriting(stream, site.layer, module, site.name, lambda _: leaf):
        return stream.run(site.layer, module, hidden)
