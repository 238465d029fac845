"""Interventions measured exactly: the KL between a model and many variants of it, in one walk.

A variant differs from the model in some blocks (rounded weights, a closed head) or outside them (rounded embeddings).
All of them walk up together while a block is resident: up to its first change a variant shares the model's states,
after it its own states are carried on. One pass over the weights thus measures any number of interventions, also on a
model that does not fit in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..console import Advance, ignore
from ..evaluate.divergence import Divergence, Tally, next_tokens
from ..store import Store
from ..stream import Stream, forward

Edit = Callable[[], AbstractContextManager[None]]
"""Makes a context within which the resident block is changed."""

Edits = Callable[[int, nn.Module, Callable[[int], Tensor]], Mapping[str, Edit]]
"""For block i: the edits of all variants that change it; its third argument gives the inputs of the context batches."""

NOTHING: Mapping[str, Edit] = MappingProxyType({})


def measure(
    stream: Stream, windows: Tensor, edits: Edits, *, outer: Mapping[str, Edit] = NOTHING,
    context: Tensor | None = None, advance: Advance = ignore,
) -> dict[str, Divergence]:  # fmt: skip
    """The divergence of every variant from the model on `windows` int64 [n, length].

    `outer` are the edits of variants that change embeddings or lm_head. `context` are further windows whose block
    inputs `edits` may look at (calibration text); they are walked through the unchanged model only.
    """
    tallies, pieces = _walk(stream, windows, edits, outer, context, advance)
    return {name: tally.result(pieces) for name, tally in tallies.items()}


def measure_windows(
    stream: Stream, windows: Tensor, edits: Edits, *, outer: Mapping[str, Edit] = NOTHING,
    context: Tensor | None = None, advance: Advance = ignore,
) -> dict[str, NDArray[np.float64]]:  # fmt: skip
    """The KL of every variant on each window [n], in nats per token: what paired comparisons need. As `measure`."""
    tallies, pieces = _walk(stream, windows, edits, outer, context, advance)
    return {name: tally.windows(pieces) for name, tally in tallies.items()}


@torch.no_grad()
def carry(
    stream: Stream, prompts: Sequence[Tensor], text: Tensor, edits: Edits, *, outer: Mapping[str, Edit] = NOTHING,
    context: Tensor | None = None, advance: Advance = ignore,
) -> dict[str, tuple[list[list[Tensor]], Divergence]]:  # fmt: skip
    """Every variant on several sets of `prompts` and on windows of `text`, in one walk.

    By name: the final hidden states of every set, micro-batch by micro-batch (for prompts, which are short), and the
    divergence on the text. Read logits of a variant of `outer` within its edit.
    """
    sets = [stream.batches(rows) for rows in prompts]
    ends = np.cumsum([len(batches) for batches in sets]).tolist()
    batches, rest = [ids for batches in sets for ids in batches], stream.batches(text)
    with _carried(stream, [*batches, *rest], edits, outer, context, advance) as (base, own, alive):
        tallies, pieces = _tally(stream, rest, len(batches), (base, own, alive), outer)
        states = {name: [own.get((name, b), stream.device) for b in range(len(batches))] for name in alive}
        return {
            name: ([found[a:b] for a, b in zip([0, *ends], ends, strict=False)], tallies[name].result(pieces))
            for name, found in states.items()
        }


@torch.no_grad()
def _walk(
    stream: Stream, windows: Tensor, edits: Edits, outer: Mapping[str, Edit], context: Tensor | None, advance: Advance
) -> tuple[dict[str, Tally], int]:
    """A tally for every variant, and how many `add` calls made up a window."""
    batches = stream.batches(windows)
    with _carried(stream, batches, edits, outer, context, advance) as carried:
        return _tally(stream, batches, 0, carried, outer)


_States = tuple[Store, Store, Iterable[str]]
"""The final states of the model under (depth, b), those of variants under (name, b), and the names."""


def _tally(
    stream: Stream, batches: Sequence[Tensor], first: int, carried: _States, outer: Mapping[str, Edit]
) -> tuple[dict[str, Tally], int]:
    """Tallies of the micro-batches that were carried from number `first` on."""
    base, own, alive = carried
    tallies = {name: Tally() for name in alive}
    step = max(1, (1 << 22) // stream.anatomy.vocab)
    for b, ids in enumerate(batches, first):
        hidden = base.get((stream.depth, b), stream.device)
        for row, labels in enumerate(next_tokens(ids)):
            for at in range(0, ids.shape[1], step):
                span = slice(at, at + step)
                reference = stream.logits(hidden[row, span])
                for name, tally in tallies.items():
                    with outer.get(name, nullcontext)():
                        changed = stream.logits(own.get((name, b), stream.device)[row, span])
                    tally.add(reference, changed, labels[span].to(reference.device))
    return tallies, -(-batches[0].shape[1] // step)


@contextmanager
def _carried(
    stream: Stream, batches: Sequence[Tensor], edits: Edits, outer: Mapping[str, Edit], context: Tensor | None,
    advance: Advance,
) -> Iterator[_States]:  # fmt: skip
    extra = [] if context is None else stream.batches(context)
    base, own = stream.store("variants-base"), stream.store("variants")
    alive: dict[str, None] = {}

    def visit(index: int, module: nn.Module, inputs: Callable[[int], Tensor]) -> None:
        changed = edits(index, module, lambda b: inputs(len(batches) + b))
        for name in [*alive, *(name for name in changed if name not in alive)]:
            with changed.get(name, nullcontext)():
                for b in range(len(batches)):
                    hidden = own.get((name, b), stream.device) if name in alive else inputs(b)
                    own.put((name, b), stream.run(index, module, hidden))
            alive[name] = None

    try:
        for name, edit in outer.items():
            with edit():
                for b, ids in enumerate(batches):
                    own.put((name, b), stream.embed(ids))
            alive[name] = None
        forward(stream, [*batches, *extra], base, visit=visit, advance=advance)
        yield base, own, alive
    finally:
        base.clear()
        own.clear()
