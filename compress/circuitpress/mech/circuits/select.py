"""From scores of single prompts to an order of nodes or edges, and from an order to a circuit of a size. No torch here.

1. `rank`: scores are averaged over prompts and ordered by size; those whose sign is not the same in nearly all
   bootstrap resamples of the prompts come last (Nikankin et al., arXiv 2510.25786: an effect that changes its sign with
   the sample is not the circuit's).
2. `top` takes the first n. Edges among them that lie on no path from the embedding to the logits do nothing and go.
3. `greedy` (edges) starts at the logits and takes, n times, the best edge into something already reached; what hangs
   in the air is never taken (Hanna et al., arXiv 2403.17806).
"""

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .graph import Graph, Mask

RESAMPLES = 200
SURE = 0.95
"""The share of bootstrap resamples that must agree on the sign of a score."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """Nodes or edges, best first.

    `score` [k] is the mean over prompts, `stderr` [k] its standard error, `agreement` [k] the share of bootstrap
    resamples with the sign of the mean. `order` [k] are indices; the first `sure` of them have a sign to rely on.
    """

    score: NDArray[np.float64]
    stderr: NDArray[np.float64]
    agreement: NDArray[np.float64]
    order: NDArray[np.int64]
    sure: int


def rank(scores: NDArray[np.float32], *, seed: int = 0) -> Ranking:
    """The ranking of scores [prompts, k]; a score of exactly zero is never sure."""
    n = len(scores)
    mean = scores.mean(0, dtype=np.float64)
    stderr = scores.std(0, ddof=1, dtype=np.float64) / n**0.5 if n > 1 else np.full(len(mean), np.nan)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float32)
    agreement = np.zeros(len(mean))
    step = max(1, (1 << 24) // RESAMPLES)
    for at in range(0, len(mean), step):
        resampled = draws @ scores[:, at : at + step]
        agreement[at : at + step] = (np.sign(resampled) == np.sign(mean[at : at + step])).mean(0)
    sure = (agreement >= SURE) & (mean != 0)
    order = np.lexsort((-np.abs(mean), ~sure))
    return Ranking(mean, stderr, agreement, order, int(sure.sum()))


def top(graph: Graph, edges: Mask, ranking: Ranking, size: int) -> Mask:
    """The first `size` edges of a ranking over the edges of `edges`, without those on no path."""
    rows, columns = np.nonzero(edges)
    chosen = ranking.order[:size]
    mask = np.zeros_like(edges)
    mask[rows[chosen], columns[chosen]] = True
    return graph.connected(mask)


def greedy(graph: Graph, edges: Mask, ranking: Ranking, size: int) -> Mask:
    """The first `size` edges that grow best-first from the logits, without those on no path from the embedding.

    Edges that are not sure are taken last.
    """
    place = np.zeros(edges.shape, dtype=np.int64)
    rows, columns = np.nonzero(edges)
    place[rows[ranking.order], columns[ranking.order]] = np.arange(len(rows))
    inputs: dict[int, list[int]] = {}
    for column, owners in enumerate(graph.owners):
        for owner in owners:
            inputs.setdefault(owner, []).append(column)
    mask = np.zeros_like(edges)
    opened: set[int] = set()
    heap: list[tuple[int, int, int]] = []

    def reach(column: int) -> None:
        if column not in opened:
            opened.add(column)
            for row in np.flatnonzero(edges[:, column]):
                heapq.heappush(heap, (int(place[row, column]), int(row), column))

    reach(len(graph.receivers) - 1)
    taken = 0
    while heap and taken < size:
        _, row, column = heapq.heappop(heap)
        mask[row, column] = True
        taken += 1
        for further in inputs.get(row, []):
            reach(further)
    return graph.connected(mask)
