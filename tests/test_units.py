"""The values between the stages: names of units, saving and loading, what a plan counts."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuitpress.units import Decision, Group, Plan, Prices, Scores, Segment, UnitId

UNITS = st.builds(
    UnitId,
    st.integers(0, 200),
    st.sampled_from(["head", "kv_group", "neuron", "expert", "feature", "layer"]),
    st.integers(0, 10**6),
)


@given(UNITS)
def test_names_of_units_read_back(unit: UnitId) -> None:
    assert UnitId.parse(str(unit)) == unit


def test_how_a_unit_prints() -> None:
    assert str(UnitId(12, "head", 7)) == "L12.head.7"
    assert sorted([UnitId(2, "head", 0), UnitId(1, "neuron", 3), UnitId(1, "head", 11), UnitId(1, "head", 2)]) == [
        UnitId(1, "head", 2), UnitId(1, "head", 11), UnitId(1, "neuron", 3), UnitId(2, "head", 0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "L1.head", "L1.head.", "L-1.head.0", "1.head.0", "L1.heads.0", "L1.head.0 ", "l1.head.0"]
)
def test_what_is_no_unit_is_told(text: str) -> None:
    with pytest.raises(ValueError, match="is not a unit: expected L<layer>") as caught:
        UnitId.parse(text)
    assert repr(text) in str(caught.value)


def some_groups() -> tuple[Group, ...]:
    rows = Segment("model.layers.0.mlp.up_proj", "rows", 0, 16, 16, 40)
    cols = Segment("model.layers.1.mlp.down_proj", "cols", 3, 10, 40, 7)
    return Group("first", 0, (rows,), (UnitId(0, "neuron", 5),)), Group("ä second", 1, (cols, rows))


def some_prices() -> Prices:
    generator = np.random.default_rng(0)
    nats = generator.random((2, 3))
    nats[1, 2] = np.inf
    return Prices(
        some_groups(), ("int2g64", "int4g64", "bfloat16"), generator.integers(1, 10**12, (2, 3)), nats, 2 * nats,
        nats / 7, {1: generator.permutation(9)}, {"fallbacks": {"x": "damping"}, "seed": 3},
    )  # fmt: skip


def test_sizes() -> None:
    first, second = some_groups()
    assert (first.numel, second.numel) == (640, 280 + 640)
    assert some_prices().numel.tolist() == [640, 920]
    assert str(first.segments[0]) == "model.layers.0.mlp.up_proj[0:16, :]"
    assert str(second.segments[0]) == "model.layers.1.mlp.down_proj[:, 3:10]"


def test_prices_read_back(tmp_path: Path) -> None:
    prices = some_prices()
    prices.save(tmp_path / "prices.safetensors")
    again = Prices.load(tmp_path / "prices.safetensors")
    for name in ("nbytes", "nats", "nats_sequence", "stderr"):
        value, expected = getattr(again, name), getattr(prices, name)
        assert value.dtype == expected.dtype
        np.testing.assert_array_equal(value, expected)
    assert (again.groups, again.formats, again.provenance) == (prices.groups, prices.formats, prices.provenance)
    assert {k: v.tolist() for k, v in again.neuron_order.items()} == {1: prices.neuron_order[1].tolist()}
    assert {path.name for path in tmp_path.iterdir()} == {"prices.safetensors", "prices.json"}


def test_columns_by_name() -> None:
    assert some_prices().column("int4g64") == 1
    with pytest.raises(KeyError, match="'int5g64' was not priced: there are int2g64, int4g64, bfloat16"):
        some_prices().column("int5g64")


def test_slices_are_saved_as_they_look(tmp_path: Path) -> None:
    """A view with strides must not be written as the memory beneath it."""
    prices = some_prices()
    every_second = Prices(
        prices.groups, ("int2g64", "bfloat16"), prices.nbytes[:, ::2], prices.nats[:, ::2],
        prices.nats_sequence[:, ::2], prices.stderr[:, ::2],
    )  # fmt: skip
    every_second.save(tmp_path / "p.safetensors")
    np.testing.assert_array_equal(Prices.load(tmp_path / "p.safetensors").nats, prices.nats[:, ::2])


def test_scores_read_back(tmp_path: Path) -> None:
    units = (UnitId(0, "head", 1), UnitId(3, "neuron", 70))
    scores = Scores("fisher", "gradient", units, np.array([0.5, 1e-12]), np.array([np.inf, 0.1]), {"draws": 2})
    scores.save(tmp_path / "scores.safetensors")
    again = Scores.load(tmp_path / "scores.safetensors")
    assert (again.method, again.evidence, again.units, again.provenance) == ("fisher", "gradient", units, {"draws": 2})
    np.testing.assert_array_equal(again.values, scores.values)
    np.testing.assert_array_equal(again.stderr, scores.stderr)


def some_plan(corrected: float | None = 0.25) -> Plan:
    first, second = some_groups()
    decisions = (Decision(first, "int4g64", 400, 0.125, protected=True), Decision(second, "int2g64", 260, 1e-7))
    return Plan("3.0bpw", "native", decisions, 660, 1560, 99, 0.1250001, corrected, 0.1, {1: (2, 0, 1)}, {"seed": 0})


@pytest.mark.parametrize("corrected", [0.25, None])
def test_plans_read_back(tmp_path: Path, corrected: float | None) -> None:
    plan = some_plan(corrected)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document == json.loads(json.dumps(plan.to_json()))
    assert document["bits_per_weight"] == 8 * 660 / 1560
    names = {
        "budget",
        "target",
        "bits_per_weight",
        "linear_bytes",
        "predicted_kl",
        "predicted_kl_corrected",
        "decisions",
    }
    assert names <= set(document)


def test_a_diff_of_plans_shows_one_line_a_decision(tmp_path: Path) -> None:
    plan = some_plan()
    plan.save(tmp_path / "a.json")
    changed = (plan.decisions[0], Decision(plan.decisions[1].group, "int3g64", 300, 1e-8))
    other = Plan(
        plan.budget, plan.target, changed, plan.linear_bytes, plan.linear_numel, plan.other_bytes, plan.predicted_kl,
        plan.predicted_kl_corrected, plan.bound_kl, plan.neuron_order, plan.provenance,
    )  # fmt: skip
    other.save(tmp_path / "b.json")
    lines = [(tmp_path / name).read_text().splitlines() for name in ("a.json", "b.json")]
    assert len(lines[0]) == len(lines[1])
    assert sum(a != b for a, b in zip(*lines, strict=True)) == 1


def test_plans_without_decisions_or_order(tmp_path: Path) -> None:
    plan = Plan("1MB", "native", (), 0, 1, 0, 0.0, None, 0.0)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
