"""The correction curve: through its probes, monotone, and a constant ratio outside."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuitpress.plan import Curve
from circuitpress.units import Probe

positive = st.floats(1e-8, 1e3)


def probes(*pairs: tuple[float, float]) -> list[Probe]:
    return [Probe(f"p{i}", 3.0, *pair) for i, pair in enumerate(pairs)]


def test_passes_through_the_probes_and_holds_the_ratio_outside() -> None:
    curve = Curve.fit(probes((2.0, 1.0), (0.01, 0.011), (0.2, 0.26)))
    assert [curve(x) for x in (0.01, 0.2, 2.0)] == pytest.approx([0.011, 0.26, 1.0])
    assert curve(0.001) == pytest.approx(0.0011)
    assert curve(20.0) == pytest.approx(10.0)
    assert curve(0.0) == 0.0


@given(st.lists(st.tuples(positive, positive), max_size=6), st.lists(positive, min_size=2, max_size=30))
def test_is_monotone_whatever_the_probes_say(pairs: list[tuple[float, float]], at: list[float]) -> None:
    values = Curve.fit(probes(*pairs)).apply(np.sort(at))
    assert np.isfinite(values).all()
    assert (values[1:] >= values[:-1] * (1 - 1e-9)).all()


def test_probes_that_disagree_are_pooled() -> None:
    curve = Curve.fit(probes((0.1, 0.4), (0.2, 0.1), (1.0, 2.0)))
    assert curve(0.1) == pytest.approx(curve(0.2)) == pytest.approx(0.2)  # the geometric mean
    assert curve(1.0) == pytest.approx(2.0)
    same = Curve.fit(probes((0.1, 0.4), (0.1, 0.1)))
    assert same(0.1) == pytest.approx(0.2)


def test_one_probe_is_a_ratio_and_none_is_the_identity() -> None:
    assert Curve.fit(probes((0.1, 0.15)))(0.3) == pytest.approx(0.45)
    empty = Curve.fit(probes((0.0, 0.1), (0.1, -0.2), (np.inf, 1.0), (0.1, np.nan)))
    assert empty(0.3) == 0.3
    assert empty.apply([[0.1], [0.2]]).tolist() == [[0.1], [0.2]]


def test_json_round_trip() -> None:
    curve = Curve.fit(probes((2.0, 1.0), (0.01, 0.011), (0.2, 0.26)))
    assert Curve.from_json(json.loads(json.dumps(curve.to_json()))) == curve
