"""From effects on single pairs to `Scores`: one convention of sign, one of error.

The effect of a unit is metric(changed) - metric(clean), for every method, exact or estimated: a unit that the behavior
needs has a negative effect. A value is the mean over pairs, its error the standard error of that mean.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..behaviors import Behavior
from ..units import Scores, UnitId

_UNIT = {"logit_diff": "logits", "accuracy": "logits", "loss": "nats", "kl": "nats", "sentence": "nats"}


def to_scores(
    method: str, evidence: Literal["causal", "gradient", "correlational"], behavior: Behavior,
    units: Sequence[UnitId], effects: Tensor, **provenance: Any,
) -> Scores:  # fmt: skip
    """Scores from effects [units, n] on every pair; what was done goes into `provenance`."""
    effects = effects.double().cpu()
    n = effects.shape[1]
    spread = effects.std(1) / n**0.5 if n > 1 else torch.full((effects.shape[0],), float("nan"))
    about = {
        "behavior": behavior.name,
        "metric": behavior.metric,
        "value": f"metric(changed) - metric(clean), {_UNIT[behavior.metric]}, mean over {n} pairs",
        "prompts": behavior.provenance,
    }
    return Scores(method, evidence, tuple(units), effects.mean(1).numpy(), spread.numpy(), about | provenance)


def total(scores: Scores, parts: Mapping[str, Sequence[UnitId]]) -> dict[str, float]:
    """Sums of values over named sets of units, such as all neurons of an MLP: meant for gradient scores, which add up.

    KeyError for a unit without a score.
    """
    value = dict(zip(scores.units, scores.values.tolist(), strict=True))
    return {name: float(np.sum([value[unit] for unit in units])) for name, units in parts.items()}
