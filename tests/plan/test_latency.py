"""Budgets in time against brute force, and what is said of tables that do not fit."""

import json
from pathlib import Path

import numpy as np
import pytest

from circuitpress.errors import InfeasibleBudget, RecipeError
from circuitpress.plan import LatencyTable, TimeLimit, make_plan
from circuitpress.plan.latency import time_rule
from circuitpress.units import Prices

from .instances import brute_force, make_prices


def _table(prices: Prices, *, batch: int = 1, seed: int = 0) -> LatencyTable:
    """Times that do not follow bytes: two-bit formats run as slowly as four-bit ones, say."""
    draw = np.random.default_rng(seed)
    times = {
        (name, segment.rows, segment.cols, batch): float(draw.uniform(1, 9))
        for group in prices.groups
        for segment in group.segments
        for name in prices.formats
    }
    return LatencyTable(times, "a machine")


def _seconds(prices: Prices, table: LatencyTable, batch: int = 1) -> np.ndarray:
    return np.array(
        [
            [sum(table.times[name, s.rows, s.cols, batch] for s in group.segments) for name in prices.formats]
            for group in prices.groups
        ]
    )


def test_times_are_read() -> None:
    assert TimeLimit.parse("12ms@batch1") == TimeLimit("12ms@batch1", 12000.0, 1)
    assert TimeLimit.parse(" .5 ms@batch16 ") == TimeLimit(".5 ms@batch16", 500.0, 16)
    assert TimeLimit.parse("850us@batch4") == TimeLimit("850us@batch4", 850.0, 4)
    for text in ("3.0bpw", "12ms", "12s@batch1", "ms@batch1", "900MB"):
        assert TimeLimit.parse(text) is None


@pytest.mark.parametrize("seed", range(4))
def test_the_plan_is_the_best_within_the_time(seed: int) -> None:
    prices = make_prices(seed, 6)
    table = _table(prices, seed=seed)
    weights = _seconds(prices, table)
    limit = float(np.mean([weights.min(1).sum(), weights.mean(1).sum()]))
    plan = make_plan(prices, budget=f"{limit}us@batch1", other_bytes=0, latencies=table)
    best = brute_force(prices, [time_rule(prices, TimeLimit("x", limit, 1), table)])
    columns = [prices.formats.index(decision.format) for decision in plan.decisions]
    assert weights[np.arange(len(columns)), columns].sum() <= limit + 1e-9
    assert plan.predicted_kl == pytest.approx(best, rel=1e-3)


def test_what_is_as_fast_is_not_made_smaller() -> None:
    """On a CPU 2 and 3 bits run through the same instructions as 4: a budget in time has no use for them."""
    prices = make_prices(3, 9)
    step = {"int2g64": 1.0, "int3g64": 1.0, "int4g64": 1.0, "int8g64": 2.0, "bfloat16": 4.0}
    cases = {(name, s.rows, s.cols) for group in prices.groups for s in group.segments for name in prices.formats}
    times = {(name, rows, cols, 1): step[name] * rows * cols for name, rows, cols in cases}
    limit = 1.5 * float(prices.numel.sum())
    by_time = make_plan(prices, budget=f"{limit}us@batch1", other_bytes=0, latencies=LatencyTable(times, "a CPU"))
    by_bytes = make_plan(prices, budget="3.5bpw", other_bytes=0)
    assert {decision.format for decision in by_time.decisions} <= {"int4g64", "int8g64", "bfloat16"}
    assert {decision.format for decision in by_bytes.decisions} & {"int2g64", "int3g64"}


def test_formats_without_a_time_are_not_taken() -> None:
    prices = make_prices(1, 8)
    table = _table(prices)
    known = {case: time for case, time in table.times.items() if case[0] != prices.formats[-1]}
    plan = make_plan(prices, budget="10ms@batch1", other_bytes=0, latencies=LatencyTable(known, "a machine"))
    assert all(decision.format != prices.formats[-1] for decision in plan.decisions)
    with pytest.raises(RecipeError, match="no time for .* at batch 3") as caught:
        make_plan(prices, budget="10ms@batch3", other_bytes=0, latencies=table)
    assert caught.value.hint is not None and "--batch 3 --save" in caught.value.hint


def test_too_little_time_is_told() -> None:
    prices = make_prices(2, 8)
    with pytest.raises(InfeasibleBudget, match=r"time .*a machine.* cannot be met"):
        make_plan(prices, budget="1us@batch1", other_bytes=0, latencies=_table(prices))


def test_a_time_needs_a_table(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no table of times"):
        make_plan(make_prices(0, 4), budget="1ms@batch1", other_bytes=0)
    path = tmp_path / "times.json"
    row = {"format": "int4g64", "rows": 7, "cols": 9, "batch": 1, "microseconds": 3.5}
    path.write_text(json.dumps({"machine": "m", "rows": [row]}))
    assert LatencyTable.load(path).times == {("int4g64", 7, 9, 1): 3.5}
    for text in ("{", "[]", '{"rows": [{"format": 1}]}'):
        path.write_text(text)
        with pytest.raises(RecipeError, match="is no table of times"):
            LatencyTable.load(path)
