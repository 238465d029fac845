"""KL(reference || model), perplexities and top-1 agreement from two sets of logits, summed window by window."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """Means over all tokens; KL in nats per predicted token, its standard error over windows (inf for one window)."""

    kl: float
    kl_stderr: float
    top1_agreement: float
    perplexity: float
    reference_perplexity: float
    tokens: int


@dataclass
class Tally:
    """Collects windows; `result` averages them."""

    kl: list[float] = field(default_factory=list)
    agree: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    reference_loss: list[float] = field(default_factory=list)
    tokens: int = 0

    def add(self, reference: Tensor, logits: Tensor, labels: Tensor | None) -> "Tally":
        """Adds part of one window: logits float32 [length, vocab] of both models, labels [length] of the next token.

        Labels of -1 (the last position has no next token in the window) count for KL but not for perplexity.
        """
        p, q = reference.log_softmax(-1), logits.log_softmax(-1)
        self.kl.append(float((p.exp() * (p - q)).sum(-1).double().sum()))
        self.agree.append(float((reference.argmax(-1) == logits.argmax(-1)).sum()))
        self.tokens += reference.shape[0]
        if labels is not None:
            known = labels >= 0
            index = labels.clamp(min=0)[:, None]
            self.loss += (-q.gather(1, index)[:, 0][known]).double().tolist()
            self.reference_loss += (-p.gather(1, index)[:, 0][known]).double().tolist()
        return self

    def windows(self, per_window: int) -> NDArray[np.float64]:
        """KL of each window, in nats per token; `per_window` is the number of `add` calls that made up a window."""
        sums = np.array(self.kl).reshape(-1, per_window).sum(1)
        return sums / (self.tokens / len(sums))

    def result(self, per_window: int) -> Divergence:
        """The averages; `per_window` as in `windows`."""
        windows = self.windows(per_window)
        spread = windows.std(ddof=1) / np.sqrt(len(windows)) if len(windows) > 1 else np.inf
        with np.errstate(over="ignore"):
            perplexities = [
                float(np.exp(np.mean(loss))) if loss else float("nan") for loss in (self.loss, self.reference_loss)
            ]
        return Divergence(
            kl=float(windows.mean()),
            kl_stderr=float(spread),
            top1_agreement=float(sum(self.agree) / self.tokens),
            perplexity=perplexities[0],
            reference_perplexity=perplexities[1],
            tokens=self.tokens,
        )


def next_tokens(ids: Tensor) -> Tensor:
    """Labels [batch, length]: the following token of each position, -1 at the end of the window."""
    return torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-1)
