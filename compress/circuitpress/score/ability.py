"""Can the model do it at all? The dense accuracy and metric of a behavior, before anybody scores or protects it.

A behavior that the model does not have cannot be lost, and scores of it rank noise. A model *can* do a behavior if it
decides at least 80 % of the pairs right and a coin would do as well with a probability below 1 % (exact binomial test).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..behaviors import Behavior
from ..console import Advance, ignore
from ..stream import Stream
from .metrics import as_decision, metric_values
from .walk import ascend, clean_inputs, final_states, own_reference

ACCURACY = 0.8
CHANCE = 0.01


@dataclass(frozen=True)
class Ability:
    """How well a model does a behavior: `mean` and `stderr` of its metric over `pairs`; `p_value` against a coin."""

    name: str
    metric: str
    pairs: int
    accuracy: float
    mean: float
    stderr: float
    p_value: float

    @property
    def is_able(self) -> bool:
        """Whether the model does it, by both criteria."""
        return self.accuracy >= ACCURACY and self.p_value < CHANCE


def behavior_values(
    stream: Stream, behavior: Behavior, *, reference: Tensor | None = None, advance: Advance = ignore
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The metric of every pair [n], and the margin of every decision [n] (positive is right), in one walk.

    `reference` are the `answer_logits` of another model for metric kl; without them kl is zero by definition.
    """
    store = stream.store("behavior")
    try:
        # Decisions about sentences need both of them, where metric loss runs the good one alone.
        both = as_decision(behavior)
        ascend(stream, {"clean": clean_inputs(stream, both)}, store, keep=False, advance=advance)
        final = final_states(stream, store, "clean")
        margins = metric_values(stream, both, final)
        if behavior.metric == "accuracy":
            return (margins > 0).astype(np.float64), margins
        if behavior.metric == "loss" and len(margins) < sum(map(len, final)):
            final = _first_rows(final, len(behavior))
        reference = own_reference(stream, behavior, final) if reference is None else reference
        return metric_values(stream, behavior, final, reference=reference), margins
    finally:
        store.clear()


def ability(stream: Stream, behavior: Behavior, *, advance: Advance = ignore) -> Ability:
    """Runs the behavior's prompts through the model; one pass over its weights."""
    values, margins = behavior_values(stream, behavior, advance=advance)
    n, right = len(margins), int((margins > 0).sum())
    stderr = float(values.std(ddof=1) / n**0.5) if n > 1 else float("nan")
    return Ability(behavior.name, behavior.metric, n, right / n, float(values.mean()), stderr, luck(right, n))


def luck(right: int, n: int) -> float:
    """The probability that a fair coin is right at least `right` times of `n`."""
    return sum(math.comb(n, k) for k in range(right, n + 1)) / 2**n


def _first_rows(batches: list[Tensor], count: int) -> list[Tensor]:
    result = []
    for hidden in batches:
        result.append(hidden[: max(0, count)])
        count -= len(hidden)
    return [hidden for hidden in result if len(hidden)]
