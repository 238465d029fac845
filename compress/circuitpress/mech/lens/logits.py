"""The logit lens: what the model would predict if it stopped after block i.

The residual stream x_i at the input of block i (i = depth: the final one) goes through the model's own final norm,
whose gain belongs to the unembedding, and through lm_head. For every depth, over all tokens:

    KL(final || lens_i), top-1 agreement with the final prediction, and the loss on the text.

It reads the residual stream alone, in the basis of the last layer: information that a later block has still to move or
rotate is invisible to it, so a high KL does not mean that nothing is known yet (the tuned lens, arXiv 2303.08112, shows
the difference). The embedding of a tied model predicts its own input. Evidence: correlational.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...console import Advance, ignore
from ...evaluate.divergence import Tally, next_tokens
from ...stream import Stream, forward

_CHUNK = 1 << 22


@dataclass(frozen=True)
class Depth:
    """After `blocks` blocks: KL in nats per token, its standard error over windows, agreement, loss in nats."""

    blocks: int
    kl: float
    kl_stderr: float
    top1_agreement: float
    loss: float


@dataclass(frozen=True)
class Guess:
    """What one position would predict after `blocks` blocks: the most likely token and its probability."""

    blocks: int
    position: int
    token: int
    probability: float


@torch.no_grad()
def logit_lens(
    stream: Stream, windows: Tensor, *, shown: Sequence[int] = (), advance: Advance = ignore
) -> tuple[list[Depth], list[Guess]]:
    """Every depth on windows int64 [n, length], and the guesses of the first window at the positions `shown`."""
    batches, store = stream.batches(windows), stream.store("lens")
    try:
        forward(stream, batches, store, keep=True, advance=advance)
        depths = []
        for i in range(stream.depth + 1):
            tally, pieces = Tally(), 1
            for b, ids in enumerate(batches):
                final = store.get((stream.depth, b), stream.device)
                hidden = store.get((i, b), stream.device)
                pieces = _add(stream, tally, final, hidden, next_tokens(ids))
            row = tally.result(pieces)
            depths.append(Depth(i, row.kl, row.kl_stderr, row.top1_agreement, math.log(row.perplexity)))
        guesses = []
        for i in range(stream.depth + 1):
            first = store.get((i, 0), stream.device)[0]
            for position in shown:
                p = stream.logits(first[position]).softmax(-1)
                guesses.append(Guess(i, position, int(p.argmax()), float(p.max())))
        return depths, guesses
    finally:
        store.clear()


def _add(stream: Stream, tally: Tally, final: Tensor, hidden: Tensor, labels: Tensor) -> int:
    """Adds the windows of a micro-batch to `tally`; into how many pieces each was cut."""
    step = max(1, _CHUNK // stream.anatomy.vocab)
    for row in range(final.shape[0]):
        for at in range(0, final.shape[1], step):
            span = slice(at, at + step)
            target = labels[row, span].to(final.device)
            tally.add(stream.logits(final[row, span]), stream.logits(hidden[row, span]), target)
    return -(-final.shape[1] // step)
