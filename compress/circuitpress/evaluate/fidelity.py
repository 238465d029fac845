"""Fidelity of a model to a reference on text: both are streamed block by block, so neither has to fit in memory.

1. Walk the reference up and keep its final hidden states; walk the model up and keep its own.
2. Turn both into logits a few hundred positions at a time and compare.

The two models may differ in architecture; they must share a vocabulary.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CircuitpressError
from ..stream import Stream, forward
from .divergence import Divergence, Tally, next_tokens


@dataclass(frozen=True)
class Fidelity:
    """What `evaluate/fidelity.json` holds: the divergence, the sizes of both models in bytes, and the seconds."""

    divergence: Divergence
    bytes: int
    reference_bytes: int
    linear_bytes: int
    bits_per_weight: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """One flat document."""
        document = asdict(self)
        return document.pop("divergence") | document


@torch.no_grad()
def fidelity(
    model: Stream, reference: Stream, windows: Tensor, *, advance: Callable[[float, str], None] | None = None
) -> Fidelity:
    """Compares `model` with `reference` on token windows int64 [n, length].

    `advance` is told of every block of either model. Raises CircuitpressError if the vocabularies differ.
    """
    start = time.monotonic()
    if model.anatomy.vocab != reference.anatomy.vocab:
        raise CircuitpressError(
            f"{model.anatomy.folder} knows {model.anatomy.vocab} tokens, "
            f"{reference.anatomy.folder} {reference.anatomy.vocab}",
            hint="compare models that share a tokenizer",
        )
    batches = reference.batches(windows)
    states = []
    for stream, name in ((reference, "reference"), (model, "model")):
        store = stream.store(f"evaluate-{name}")
        states.append(store)
        forward(stream, batches, store, advance=advance)
    tally = Tally()
    # Four arrays of this many logits exist at a time: 16 MiB each.
    step = max(1, (1 << 22) // reference.anatomy.vocab)
    for b, ids in enumerate(batches):
        hidden = [store.get((s.depth, b), s.device) for s, store in zip((reference, model), states, strict=True)]
        for row, labels in enumerate(next_tokens(ids)):
            for at in range(0, ids.shape[1], step):
                span = slice(at, at + step)
                p, q = (s.logits(h[row, span]) for s, h in zip((reference, model), hidden, strict=True))
                tally.add(p, q.to(p.device), labels[span].to(p.device))
    for store in states:
        store.clear()
    anatomy = model.anatomy
    return Fidelity(
        divergence=tally.result(-(-windows.shape[1] // step)),
        bytes=anatomy.file_bytes,
        reference_bytes=reference.anatomy.file_bytes,
        linear_bytes=anatomy.linear_bytes,
        bits_per_weight=anatomy.bits_per_weight,
        seconds=time.monotonic() - start,
    )
