"""Steering: what adding a multiple of a direction at a site does to the model's predictions. Evidence: causal.

For each strength alpha, alpha * direction is added at every position (of a feature: d_f, so that alpha is in units of
its activation) and the whole model is run: KL(original || steered), top-1 agreement and loss as for any intervention,
and the mean change of every token's log-probability, whose largest entries say what the direction promotes.

A direction that promotes what its examples show is evidence that the model reads it. A direction of the same norm drawn
at random is measured beside it: a large step in any direction does something.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...console import Advance, ignore
from ...score.variants import Edit, measure
from ...stream import Stream
from ..flow import Objective, flows
from ..sites import Site, rewriting


@dataclass(frozen=True)
class Steered:
    """One strength: KL and its standard error in nats per token, top-1 agreement, loss and the loss without steering.

    `change` float64 [vocab] is the mean change of log-probabilities over all positions; `control_kl` the KL of a random
    direction of the same norm.
    """

    alpha: float
    kl: float
    kl_stderr: float
    control_kl: float
    top1_agreement: float
    loss: float
    reference_loss: float
    change: NDArray[np.float64]


def steer(
    stream: Stream, windows: Tensor, site: Site, direction: Tensor, alphas: Sequence[float], *, seed: int = 0,
    advance: Advance = ignore,
) -> list[Steered]:  # fmt: skip
    """Adds alpha * direction [width] at `site` on windows int64 [n, length], once for each of `alphas`."""
    site.width(stream.anatomy)
    random = torch.randn(direction.shape, generator=torch.Generator().manual_seed(seed))
    random *= direction.float().norm().cpu() / random.norm()
    added = {f"d{i}": alpha * direction for i, alpha in enumerate(alphas)}
    added |= {f"r{i}": alpha * random for i, alpha in enumerate(alphas)}

    def edits(index: int, module: nn.Module, inputs: Callable[[int], Tensor]) -> Mapping[str, Edit]:  # noqa: ARG001
        if index != site.layer:
            return {}
        return {
            name: lambda v=vector: rewriting(stream, index, module, site.name, lambda x: x + v.to(x))
            for name, vector in added.items()
        }

    found = measure(stream, windows, edits, advance=advance)
    changes = _changes(stream, windows, site, [added[f"d{i}"] for i in range(len(alphas))], advance)
    return [
        Steered(
            alpha, found[f"d{i}"].kl, found[f"d{i}"].kl_stderr, found[f"r{i}"].kl, found[f"d{i}"].top1_agreement,
            float(np.log(found[f"d{i}"].perplexity)), float(np.log(found[f"d{i}"].reference_perplexity)), changes[i],
        )
        for i, alpha in enumerate(alphas)
    ]  # fmt: skip


def _changes(
    stream: Stream, windows: Tensor, site: Site, vectors: Sequence[Tensor], advance: Advance
) -> list[NDArray[np.float64]]:
    """The mean change of log-probabilities [vocab] for each vector added at the site."""
    batches = stream.batches(windows)

    def objective(_: int, hidden: Tensor) -> Tensor:
        """Mean log-probabilities [batch, vocab], one sequence at a time."""
        return torch.stack([stream.logits(sequence).log_softmax(-1).mean(0) for sequence in hidden])

    points = [lambda _, x: x, *(lambda _, x, v=v: x + v.to(x) for v in vectors)]
    found = flows(stream, batches, site, objective, points, gradients=False, advance=advance)
    means = [torch.cat(list(flow.values)).double().mean(0).cpu() for flow in found]
    return [(mean - means[0]).numpy() for mean in means[1:]]


def logit_change(
    stream: Stream, batches: Sequence[Tensor], site: Site, direction: Tensor, alphas: Sequence[float],
    objective: Objective,
) -> NDArray[np.float64]:  # fmt: skip
    """objective(steered) - objective(as it is) for each alpha and sequence: float64 [alphas, sequences]."""
    points = [lambda _, x: x, *(lambda _, x, a=alpha: x + a * direction.to(x) for alpha in alphas)]
    found = flows(stream, batches, site, objective, points, gradients=False)
    values = torch.stack([torch.cat(list(flow.values)).double() for flow in found]).cpu()
    return (values[1:] - values[0]).numpy()
