"""Activations of one site as rows to learn from, in a seeded order that a resumed run continues.

1. The blocks below the site are walked once; activations go to a `Store`, which spills to disk, a micro-batch a piece.
   The first `skip` positions of every window are left out: attention sinks have norms up to a hundred times the rest
   and would be all that the SAE learns.
2. `shuffled` draws pieces in random order, mixes as many as fit in 256 MiB and cuts batches from their permuted rows.
   The order depends on the seed and the epoch alone, so step s sees the same rows however often training stopped.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...console import Advance, ignore
from ...errors import CircuitpressError
from ...store import Store
from ...stream import Stream
from ..sites import Site, collect

_MIXED = 1 << 28


@dataclass(frozen=True)
class Rows:
    """Activations [counts[b], width] of a site in pieces b; `mean` float32 [width] and `norm` are over all rows.

    `factor` = sqrt(width) / norm brings the mean norm to sqrt(width), so that one learning rate fits all sites.
    """

    store: Store
    site: Site
    counts: tuple[int, ...]
    skip: int
    mean: Tensor
    norm: float

    @property
    def total(self) -> int:
        """Number of rows."""
        return sum(self.counts)

    @property
    def factor(self) -> float:
        """What rows are multiplied by before training."""
        return len(self.mean) ** 0.5 / self.norm

    def piece(self, b: int) -> Tensor:
        """Piece b in float32."""
        return self.store.get((str(self.site), b))[:, self.skip :].flatten(0, 1).float()

    def close(self) -> None:
        """Forgets the activations."""
        self.store.clear()


def gather(stream: Stream, windows: Tensor, site: Site, *, skip: int = 1, advance: Advance = ignore) -> Rows:
    """The activations of `site` on windows int64 [n, length], without the first `skip` positions of each."""
    if windows.shape[1] <= skip:
        raise CircuitpressError(
            f"windows of {windows.shape[1]} tokens have none left after {skip}", hint="raise --length"
        )
    batches = stream.batches(windows)
    store = collect(stream, batches, [site], into=stream.store("sae"), advance=advance)
    width = site.width(stream.anatomy)
    total, norm, counts = torch.zeros(width, dtype=torch.float64), 0.0, []
    for b in range(len(batches)):
        rows = store.get((str(site), b))[:, skip:].flatten(0, 1).double()
        total += rows.sum(0)
        norm += float(rows.norm(dim=1).sum())
        counts.append(rows.shape[0])
    if norm == 0:
        raise CircuitpressError(f"all activations of {site} are zero", hint="choose another --site")
    n = sum(counts)
    return Rows(store, site, tuple(counts), skip, (total / n).float(), norm / n)


def shuffled(rows: Rows, batch: int, *, seed: int, start: int = 0) -> Iterator[Tensor]:
    """Batches [batch, width] without end, beginning with number `start`."""
    if rows.total < batch:
        raise CircuitpressError(f"{rows.total} activations are less than one batch of {batch}", hint="raise --tokens")
    step = 0
    for epoch in itertools.count():
        for number, group in enumerate(_groups(rows, batch, seed, epoch)):
            held = sum(rows.counts[b] for b in group)
            if step + held // batch <= start:  # seen before the interruption
                step += held // batch
                continue
            mixed = torch.cat([rows.piece(b) for b in group])
            order = torch.randperm(held, generator=_generator(seed, epoch, number))
            for part in order.split(batch)[: held // batch]:
                step += 1
                if step > start:
                    yield mixed[part]


def _groups(rows: Rows, batch: int, seed: int, epoch: int) -> list[list[int]]:
    """The pieces of one epoch, in random order, in groups of at least one batch and about 256 MiB."""
    order = torch.randperm(len(rows.counts), generator=_generator(seed, epoch, -1)).tolist()
    least = max(batch, _MIXED // (4 * len(rows.mean)))
    groups: list[list[int]] = [[]]
    for b in order:
        if sum(rows.counts[c] for c in groups[-1]) >= least:
            groups.append([])
        groups[-1].append(b)
    if len(groups) > 1 and sum(rows.counts[b] for b in groups[-1]) < batch:
        groups[-2] += groups.pop()
    return groups


def _generator(seed: int, epoch: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 65_537 + number + 1)
