"""How far rounding leans for the behaviors that a run keeps: lambda of lean.py, found by measurement.

1. The plan is measured as it is: margins on the watched half of the pairs, KL on held-out text. Nothing more is done if
   every behavior is above its floor.
2. The response matrix says which lambda >= 0 would bring all margins to their aims if weights answered (margins.py). An
   aim is the floor and two standard errors of what rounding without a lean did to the pairs, since others will judge.
3. Codes answer by less: the plan is rounded with the lean of each half of the watched pairs and measured on the other,
   and lambda is solved for again with the share of its gain that every behavior has got.
4. A lean that raises KL by more than ROOM is too much; half-way back to the last one that did not comes next.

The best lean in the end: that which misses fewest behaviors, then the one that misses by least.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

ROUNDS = 5
"""Leans that are measured at most."""
AIM = 2.0
"""Standard errors above the floor. Those who judge are other pairs, which have as large an error of their own."""
ROOM = 0.08
"""Of KL on held-out text. One of two roundings of a plan is 1 to 3 % better by luck: 10 % is not passed by much."""
LEAST_ANSWER = 0.1
"""Of the first-order gain, and of what behaviors gain apart from one another: less is noise."""


@dataclass(frozen=True)
class Measured:
    """A plan on the watched pairs: mean margin and share of right decisions by behavior, the standard error of what
    rounding did to the margins, and KL in nats per token on held-out text."""

    margins: NDArray[np.float64]
    accuracies: NDArray[np.float64]
    stderr: NDArray[np.float64]
    kl: float

    def to_json(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Margins and accuracies by name."""
        rows = zip(names, self.margins.tolist(), self.accuracies.tolist(), strict=True)
        return {name: {"margin": margin, "accuracy": accuracy} for name, margin, accuracy in rows}


@dataclass(frozen=True)
class Floors:
    """What must be left of every behavior; one of the two figures of each counts (`by_margin`)."""

    margins: NDArray[np.float64]
    accuracies: NDArray[np.float64]
    by_margin: NDArray[np.bool_]
    dense: NDArray[np.float64]
    """Mean margins of the original."""

    def short(self, measured: Measured) -> NDArray[np.float64]:
        """The share of each floor that is missed; 0 where it is reached."""
        have = np.where(self.by_margin, measured.margins, measured.accuracies)
        need = np.where(self.by_margin, self.margins, self.accuracies)
        return np.maximum(0, 1 - have / need)

    def missing(self, measured: Measured, stderr: NDArray[np.float64]) -> NDArray[np.float64]:
        """By how much margins miss their aims, AIM times `stderr` above their floors. What is asked of a behavior that
        decides too little right is the whole margin of the original: that much of it decided right."""
        aim = np.where(self.by_margin, self.margins + AIM * stderr, self.dense)
        done = ~self.by_margin & (measured.accuracies >= self.accuracies)
        return np.where(done, 0, np.maximum(0, aim - measured.margins))


@dataclass(frozen=True)
class Leaning:
    """The lean that was found: lambda of every behavior, what it measured, and how it was found."""

    nats: NDArray[np.float64]
    measured: Measured
    rounds: tuple[dict[str, Any], ...]


def find_lean(
    measure: Callable[[NDArray[np.float64]], Measured],
    floors: Floors,
    respond: Callable[[], NDArray[np.float64]] | None,
) -> Leaning:
    """Searches lambda [behaviors] as above. `measure` rounds with a lambda; `respond` gives the response matrix, and is
    not asked where the plan does without a lean, and is None where rounding cannot lean."""
    upright = measure(np.zeros(len(floors.margins)))
    tried = [(np.zeros(len(floors.margins)), upright)]
    if respond is not None and floors.short(upright).any():
        gains = respond()
        fair, dear = tried[0][0], None
        wanted = floors.missing(upright, upright.stderr)
        nats = _solve(gains, wanted)
        for _ in range(ROUNDS):
            if not nats.any():
                break
            now = measure(nats)
            tried.append((nats, now))
            if now.kl > (1 + ROOM) * upright.kl:
                dear = nats
            elif not floors.missing(now, upright.stderr).any():
                break
            else:
                fair = nats
                share = _answers(now.margins - upright.margins, gains @ nats, upright.stderr)
                wanted = np.maximum(wanted, floors.missing(now, upright.stderr))
                nats = _solve(gains * np.sqrt(np.outer(share, share)), wanted)
            if dear is not None:
                nats = (fair + dear) / 2
    best = min(
        (entry for entry in tried if entry[1].kl <= (1 + ROOM) * upright.kl),
        key=lambda entry: _merit(floors, entry[1], upright.stderr),
    )
    rounds = tuple({"nats": nats.tolist(), "kl": found.kl, "margins": found.margins.tolist()} for nats, found in tried)
    return Leaning(*best, rounds)


def _answers(
    gained: NDArray[np.float64], expected: NDArray[np.float64], stderr: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The share of its first-order gain that every behavior has got.

    Two roundings differ by about two variances of a margin, so where little was expected little has been shown: there
    it is the share of all behaviors together.
    """
    noise = 2 * stderr**2
    known = np.maximum(noise, np.finfo(np.float64).tiny)
    whole = float((gained * expected / known).sum() / (expected**2 / known).sum())
    found = (gained * expected + noise * np.clip(whole, LEAST_ANSWER, 1)) / (expected**2 + known)
    return found.clip(LEAST_ANSWER, 1)


def _solve(gains: NDArray[np.float64], missing: NDArray[np.float64]) -> NDArray[np.float64]:
    """The cheapest lambda >= 0 with gains @ lambda >= missing, to second order: text pays 1/2 lambda^T K lambda.

    Its optimality conditions are those of min 1/2 lambda^T K lambda - missing^T lambda, lambda >= 0: least squares in a
    root of K. A behavior whose own gain is no gain gets nothing.
    """
    result = np.zeros(len(missing))
    own = np.diag(gains)
    (able,) = np.nonzero(own > 0)
    if len(able):
        size = np.sqrt(own[able])
        values, vectors = np.linalg.eigh(gains[np.ix_(able, able)] / np.outer(size, size))
        values = values.clip(min=LEAST_ANSWER)
        root = (vectors * np.sqrt(values)).T
        result[able] = nnls(root, vectors.T @ (missing[able] / size) / np.sqrt(values))[0] / size
    return result


def _merit(floors: Floors, measured: Measured, stderr: NDArray[np.float64]) -> tuple[float, ...]:
    short, missing = floors.short(measured), floors.missing(measured, stderr)
    return float((short > 0).sum()), float(short.sum()), float((missing / np.abs(floors.dense)).sum()), measured.kl
