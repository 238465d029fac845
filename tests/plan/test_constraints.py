"""Constraints: what patterns name, what protection allows, floors, and what a rule must hold."""

import numpy as np
import pytest

from circuitpress.errors import RecipeError
from circuitpress.plan import Constraint
from circuitpress.plan.constraints import best_option, cap, floor, matching, nominal_bits, protect
from circuitpress.units import Group, Segment, UnitId

from .instances import make_prices, replaced


@pytest.mark.parametrize(
    ("pattern", "hits"),
    [
        ("L1", [3, 4, 5]),
        ("L0.head.1", [0]),
        ("L?.head.0", [0, 3]),
        ("model.layers.0.*", [0, 1, 2]),
        ("*.down_proj", [2, 5]),
        ("model.layers.1.mlp.up_proj", [4]),
    ],
)
def test_patterns(pattern: str, hits: list[int]) -> None:
    assert np.flatnonzero(matching(make_prices(0, 6).groups, [pattern])).tolist() == hits


def test_names_of_segments_are_matched_as_they_stand() -> None:
    segment = Segment("model.layers.0.q_proj", "rows", 8, 16, 8, 5)
    groups = [Group(str(segment), 0, (segment,), (UnitId(0, "kv_group", 1),)), Group("other", 0, (segment,))]
    assert matching(groups, ["model.layers.0.q_proj[8:16, :]"]).tolist() == [True, False]
    assert matching(groups, ["model.layers.0.q_proj"]).tolist() == [True, True]


def test_every_pattern_without_a_match_is_named_with_its_neighbours() -> None:
    with pytest.raises(RecipeError) as caught:
        matching(make_prices(0, 6).groups, ["L0.head.0", "L0.head.7", "*.down_prj"])
    first, second = caught.value.problems
    assert "'L0.head.7'" in first
    assert "L0.head.1" in first
    assert "'*.down_prj'" in second


def test_protected_groups_keep_the_best_format() -> None:
    prices = make_prices(0, 6)
    allowed = protect(prices, ["L0"]).allowed
    assert allowed is not None
    assert allowed[:3].tolist() == [[False] * 4 + [True]] * 3
    assert allowed[3:].all()


def test_the_best_format_is_the_smallest_of_those_that_lose_nothing() -> None:
    prices = make_prices(0, 3, formats=("int8g64", "bfloat16", "int3g64"))
    assert best_option(prices).argmax(1).tolist() == [1, 1, 1]
    nats = prices.nats.copy()
    nats[:, 1] = np.inf
    assert best_option(replaced(prices, nats)).argmax(1).tolist() == [0, 0, 0]
    nats[1] = [np.inf, np.inf, 0.1]
    assert best_option(replaced(prices, nats)).argmax(1).tolist() == [0, 2, 0]


def test_protection_with_a_floor() -> None:
    allowed = protect(make_prices(0, 6), ["*.up_proj"], floor="int4g64").allowed
    assert allowed is not None
    assert allowed[1].tolist() == [False, False, True, True, True]
    assert allowed[0].all()


def test_floor() -> None:
    allowed = floor(make_prices(0, 6), [0], 3).allowed
    assert allowed is not None
    assert allowed[:3].tolist() == [[False, True, True, True, True]] * 3
    assert allowed[3:].all()
    with pytest.raises(RecipeError, match="layer 2 does not exist") as caught:
        floor(make_prices(0, 6), [0, 2], 3)
    assert caught.value.hint == "the model has layers 0 to 1"


@pytest.mark.parametrize(
    ("name", "bits"), [("int4g64", 4), ("bfloat16", 16), ("float32", 32), ("drop", 0), ("nf4", 4), ("trellis3", 3)]
)
def test_nominal_bits(name: str, bits: float) -> None:
    assert nominal_bits(name) == bits


def test_a_name_without_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="states no number"):
        nominal_bits("tiny")


def test_a_rule_is_a_mask_or_a_cap() -> None:
    table = np.ones((2, 3))
    for parts in ({}, {"cap": 1.0}, {"weights": table}, {"weights": table, "cap": 1.0, "allowed": table > 0}):
        with pytest.raises(ValueError, match="needs either"):
            Constraint("odd", "test", **parts)
    with pytest.raises(ValueError, match="weights"):
        cap(make_prices(0, 3), "latency", table, 1.0, reason="test")
