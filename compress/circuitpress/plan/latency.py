"""Budgets in time, `12ms@batch1`: how long the linear maps of all decoder blocks may take for one step.

Time is a linear cap like bytes are: with a table of measured times (format, rows, cols, batch -> microseconds) every
group has a weight in every format, and their sum is at most the limit. What a step takes beside its linear maps
(attention, norms, lm_head, launching) is the same for all plans, and not in the sum. The table is made on the machine
that will run the model, by `circuitpress bench kernels MODEL --save FILE`: times of one machine say little about those
of another.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import RecipeError
from ..units import OUTER, Prices
from .constraints import Constraint

_TIME = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(us|ms)@batch(\d+)")
Case = tuple[str, int, int, int]
"""Format, rows, cols, batch."""


@dataclass(frozen=True)
class TimeLimit:
    """At most `microseconds` for a step of `batch` tokens; `text` is what was written."""

    text: str
    microseconds: float
    batch: int

    @classmethod
    def parse(cls, text: str) -> "TimeLimit | None":
        """Reads `12ms@batch1` or `850us@batch4`; None for what is no time."""
        match = _TIME.fullmatch(text.strip())
        if match is None:
            return None
        return cls(text.strip(), float(match[1]) * {"us": 1.0, "ms": 1000.0}[match[2]], int(match[3]))


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Measured times in microseconds, and what they were measured on."""

    times: Mapping[Case, float]
    machine: str

    @classmethod
    def load(cls, path: Path) -> "LatencyTable":
        """Reads what `circuitpress bench kernels --save` wrote; RecipeError for anything else."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            rows = document["rows"]
            times = {(r["format"], r["rows"], r["cols"], r["batch"]): float(r["microseconds"]) for r in rows}
        except (OSError, ValueError, KeyError, TypeError) as error:
            hint = "circuitpress bench kernels MODEL --save FILE makes one"
            raise RecipeError([f"plan.latencies: {path} is no table of times: {error!r}"], hint=hint) from error
        return cls(times, str(document.get("machine", "")))


def time_rule(prices: Prices, limit: TimeLimit, table: LatencyTable) -> Constraint:
    """The cap on the time of all groups of the decoder blocks.

    Formats that the table lacks for a group's shape are not on offer there; RecipeError if a group is left without any.
    """
    weights = np.zeros(prices.nats.shape)
    missing: set[Case] = set()
    for i, group in enumerate(prices.groups):
        if group.layer == OUTER:
            continue
        for j, name in enumerate(prices.formats):
            cases = [(name, segment.rows, segment.cols, limit.batch) for segment in group.segments]
            known = [case for case in cases if case in table.times]
            missing |= set(cases) - set(known)
            weights[i, j] = sum(table.times[case] for case in known) if len(known) == len(cases) else np.inf
        if not np.isfinite(weights[i]).any():
            case = next(iter(sorted(missing)))
            raise RecipeError(
                [f"plan.latencies: no time for {case[1]} x {case[2]} at batch {limit.batch} in any format on offer"],
                hint=f"circuitpress bench kernels MODEL --batch {limit.batch} --save FILE measures the model's shapes",
            )
    reason = f"{limit.text} for the linear maps of all blocks, by times of {table.machine or 'an unnamed machine'}"
    # Without a time there is no promise: such options weigh more than the whole limit.
    weights = np.where(np.isfinite(weights), weights, 2 * limit.microseconds)
    return Constraint("time", reason, weights=weights, cap=limit.microseconds)
