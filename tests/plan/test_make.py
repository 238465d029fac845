"""Whole plans: budgets, protection, the front, differences, and plan.json."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from circuitpress.errors import RecipeError
from circuitpress.plan import Curve, diff, make_plan, pareto, solve, thin
from circuitpress.plan import constraints as rules
from circuitpress.units import Plan, Probe

from .instances import brute_force, make_prices

CURVE = Curve.fit([Probe("int2", 2.3, 1.0, 0.7), Probe("int4", 4.3, 0.01, 0.011)])


def test_a_plan_adds_up() -> None:
    prices = dataclasses.replace(make_prices(0, 12), neuron_order={1: np.array([2, 0, 1])})
    plan = make_plan(prices, budget="3.0bpw", other_bytes=123, curve=CURVE)
    assert plan.bits_per_weight <= 3.0
    assert plan.linear_bytes == sum(decision.nbytes for decision in plan.decisions)
    assert plan.predicted_kl == pytest.approx(sum(decision.nats for decision in plan.decisions))
    assert plan.predicted_kl_corrected == CURVE(plan.predicted_kl)
    assert plan.bound_kl <= plan.predicted_kl
    assert [decision.group for decision in plan.decisions] == list(prices.groups)
    assert plan.neuron_order == {1: (2, 0, 1)}
    assert (plan.budget, plan.target, plan.other_bytes) == ("3.0bpw", "native", 123)


def test_every_unit_of_budget_means_the_same() -> None:
    prices = make_prices(0, 12)
    numel = int(prices.numel.sum())
    by_bits = make_plan(prices, budget="4bpw", other_bytes=1000)
    by_share = make_plan(prices, budget="25%", other_bytes=1000)
    by_files = make_plan(prices, budget=f"{numel * 4 // 8 + 1000}B", other_bytes=1000)
    assert by_bits.decisions == by_share.decisions == by_files.decisions


def test_protection_and_floors_hold() -> None:
    prices = make_prices(0, 12)
    plan = make_plan(prices, budget="5.5bpw", other_bytes=0, protect=["L1.head.0"], floors={0: 3, 3: 4})
    for decision in plan.decisions:
        is_named = decision.group.name == "model.layers.1.self_attn.q_proj"
        assert decision.protected == is_named
        if is_named:
            assert decision.format == "bfloat16"
        least = {0: 3, 3: 4}.get(decision.group.layer, 0)
        assert rules.nominal_bits(decision.format) >= least


def test_other_targets_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"plan\.target: 'onnx' is not a target: there are native, compressed-"):
        make_plan(make_prices(0, 3), budget="3bpw", target="onnx", other_bytes=0)


def test_plan_survives_json(tmp_path: Path) -> None:
    prices = dataclasses.replace(make_prices(0, 7), neuron_order={0: np.array([1, 0])})
    plan = make_plan(prices, budget="6bpw", other_bytes=5, protect=["L2"], curve=CURVE)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_no_plan_dominates_a_point_of_the_front() -> None:
    prices = make_prices(2, 5)
    points = pareto(prices, curve=CURVE)
    assert points[0].linear_bytes == prices.nbytes.min(1).sum()
    assert points[-1].predicted_kl == pytest.approx(prices.nats.min(1).sum())
    for before, after in zip(points, points[1:], strict=False):
        assert after.linear_bytes > before.linear_bytes
        assert after.predicted_kl < before.predicted_kl
        assert after.predicted_kl_corrected <= before.predicted_kl_corrected  # pyright: ignore[reportOperatorIssue]
    weights = prices.nbytes.astype(float)
    for point in points:
        within = rules.Constraint("budget", "", weights=weights, cap=float(point.linear_bytes))
        assert point.predicted_kl == pytest.approx(brute_force(prices, [within]), rel=1e-9, abs=1e-15)
        assert solve(prices, [within]).nats == pytest.approx(point.predicted_kl, rel=1e-9, abs=1e-15)


def test_the_front_respects_masks_and_has_a_short_form() -> None:
    prices = make_prices(2, 200)
    masked = pareto(prices, constraints=[rules.floor(prices, range(66), 4)])
    assert masked[0].bits_per_weight > 4
    assert masked[0].predicted_kl_corrected is None
    points = pareto(prices)
    few = thin(points, most=23)
    assert 12 < len(few) <= 23
    assert (few[0], few[-1]) == (points[0], points[-1])
    assert thin(few) == few
    assert few[0].to_json().keys() == {"bits_per_weight", "linear_bytes", "predicted_kl", "predicted_kl_corrected"}


def test_difference_of_two_plans() -> None:
    prices = make_prices(0, 12)
    a = make_plan(prices, budget="3bpw", other_bytes=0)
    b = make_plan(prices, budget="4bpw", other_bytes=0)
    delta = diff(a, b)
    assert delta.bytes_delta == b.linear_bytes - a.linear_bytes > 0 > delta.nats_delta
    assert sum(change.bytes_delta for change in delta.changes) == delta.bytes_delta
    assert sum(layer.nats_delta for layer in delta.layers) == pytest.approx(delta.nats_delta)
    assert sum(layer.changed for layer in delta.layers) == len(delta.changes) == delta.to_json()["changed"]
    moved = [abs(change.nats_delta) for change in delta.changes]
    assert moved == sorted(moved, reverse=True)
    assert diff(a, a).changes == diff(a, a).layers == ()


def test_difference_of_plans_with_other_groups() -> None:
    prices = make_prices(0, 6)
    a = make_plan(prices, budget="3bpw", other_bytes=0)
    b = dataclasses.replace(a, decisions=a.decisions[:-1], linear_bytes=a.linear_bytes - a.decisions[-1].nbytes)
    (change,) = diff(a, b).changes
    assert (change.before, change.after) == (a.decisions[-1].format, None)
    assert change.bytes_delta == diff(a, b).bytes_delta == -a.decisions[-1].nbytes
