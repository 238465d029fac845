"""Embedding and lm_head in the plan: fixed under budgets that do not count them, options under those that do."""

from pathlib import Path

import numpy as np
import pytest

from circuitpress.errors import InfeasibleBudget, RecipeError
from circuitpress.plan import Constraint, make_plan
from circuitpress.plan.outside import join, widen
from circuitpress.units import OUTER, Group, Plan, Prices, Segment

from .instances import brute_force, make_prices

FORMATS = ("int4g32", "int8g64", "bfloat16")


def outer_prices() -> Prices:
    groups = tuple(
        Group(name, OUTER, (Segment(name, "rows", 0, 50, 50, 40),)) for name in ("model.embed_tokens", "lm_head")
    )
    nbytes = np.array([[1150, 2100, 4000], [1150, 2100, 4000]], dtype=np.int64)
    nats = np.array([[2e-2, 1e-4, 0], [3e-2, 2e-4, 0]])
    return Prices(groups, FORMATS, nbytes, nats, nats, nats / 10)


@pytest.mark.parametrize("budget", ["3.2bpw", "20%"])
def test_a_budget_of_block_weights_leaves_them_as_they_are(budget: str) -> None:
    prices, outer = make_prices(0, 9), outer_prices()
    plain = make_plan(prices, budget=budget, other_bytes=100)
    plan = make_plan(prices, budget=budget, other_bytes=100, outer=outer)
    assert [d.format for d in plan.decisions] == [d.format for d in plain.decisions]
    assert [(d.group.name, d.format) for d in plan.outer] == [
        ("model.embed_tokens", "bfloat16"),
        ("lm_head", "bfloat16"),
    ]
    assert plan.linear_bytes == plain.linear_bytes
    assert plan.linear_numel == plain.linear_numel == int(prices.numel.sum())
    assert plan.other_bytes == 100 + 8000
    assert plan.predicted_kl == pytest.approx(plain.predicted_kl)


def test_a_named_format_is_taken_under_every_budget() -> None:
    prices, outer = make_prices(0, 9), outer_prices()
    for budget in ("3.2bpw", "30kB"):
        plan = make_plan(prices, budget=budget, other_bytes=100, outer=outer, outer_format="int8g64")
        assert [d.format for d in plan.outer] == ["int8g64", "int8g64"]
        assert plan.other_bytes == 100 + 4200
        inside = sum(decision.nats for decision in plan.decisions)
        assert plan.predicted_kl == pytest.approx(inside + 3e-4)


def test_a_budget_of_files_chooses_for_all() -> None:
    prices, outer = make_prices(2, 4), outer_prices()
    sizes = []
    for budget in (5200, 6000, 8000, 11000):
        plan = make_plan(prices, budget=f"{budget}B", other_bytes=100, outer=outer)
        whole = plan.linear_bytes + plan.other_bytes
        sizes.append(plan.other_bytes)
        assert whole <= budget
        joined = join(prices, outer)
        cap = Constraint("budget", "", weights=joined.nbytes.astype(np.float64), cap=budget - 100.0)
        assert plan.predicted_kl == pytest.approx(brute_force(joined, [cap]), rel=1e-3)
    assert sizes[0] < sizes[-1]


def test_protected_lm_head_keeps_its_best_format() -> None:
    plan = make_plan(make_prices(2, 4), budget="9000B", other_bytes=100, outer=outer_prices(), protect=["lm_head"])
    assert {d.group.name: d.format for d in plan.outer}["lm_head"] == "bfloat16"
    assert [d.protected for d in plan.outer] == [False, True]


def test_formats_of_one_table_are_not_on_offer_in_the_other() -> None:
    prices, outer = make_prices(0, 3), outer_prices()
    joined = join(prices, outer)
    assert joined.formats == (*prices.formats, "int4g32")
    assert np.isinf(joined.nats[:3, -1]).all()
    assert np.isinf(joined.nats[3:, joined.column("int2g64")]).all()
    for i, form in enumerate(FORMATS):
        assert (joined.nats[3:, joined.column(form)] == outer.nats[:, i]).all()
        assert (joined.nbytes[3:, joined.column(form)] == outer.nbytes[:, i]).all()
    assert joined.linear_numel == prices.linear_numel
    assert joined.is_linear.tolist() == [True] * 3 + [False] * 2


def test_rules_on_blocks_say_nothing_of_the_rest() -> None:
    prices, outer = make_prices(0, 3), outer_prices()
    joined = join(prices, outer)
    mask = Constraint("mask", "", allowed=np.zeros(prices.nats.shape, dtype=np.bool_))
    wide = widen(mask, prices, joined)
    assert wide.allowed is not None
    assert not wide.allowed[:3, :5].any()
    assert wide.allowed[3:].all()
    cap = widen(Constraint("cap", "", weights=np.ones(prices.nats.shape), cap=2.0), prices, joined)
    assert cap.weights is not None
    assert cap.weights.sum() == 15


def test_what_cannot_be_is_said() -> None:
    prices, outer = make_prices(0, 9), outer_prices()
    with pytest.raises(RecipeError, match="int6g64 was not priced: there are int4g32, int8g64, bfloat16"):
        make_plan(prices, budget="3.2bpw", other_bytes=0, outer=outer, outer_format="int6g64")
    with pytest.raises(InfeasibleBudget, match="embedding and lm_head") as error:
        make_plan(prices, budget="2500B", other_bytes=0, outer=outer)
    assert error.value.smallest_bytes == int(prices.nbytes.min(1).sum()) + 2300
    assert error.value.smallest_bits == pytest.approx(8 * prices.nbytes.min(1).sum() / prices.numel.sum())


def test_a_plan_with_outer_decisions_is_read_back(tmp_path: Path) -> None:
    plan = make_plan(make_prices(0, 9), budget="30kB", other_bytes=100, outer=outer_prices())
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    plain = make_plan(make_prices(0, 9), budget="30kB", other_bytes=100)
    plain.save(tmp_path / "plain.json")
    assert Plan.load(tmp_path / "plain.json").outer == ()
