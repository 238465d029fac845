"""The search for a lean, on margins that answer by a rule."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from circuitpress.run.leaning import ROOM, ROUNDS, Floors, Measured, find_lean

GAINS = np.array([[4.0, 1.0], [1.0, 9.0]])
DENSE = np.array([2.0, 3.0])
START = np.array([1.4, 2.9])

Measure = Callable[[NDArray[np.float64]], Measured]


def floors(keep: float = 1.0, *, by_margin: bool = True) -> Floors:
    return Floors(keep * DENSE, np.array([0.9, 0.9]), np.full(2, by_margin), DENSE)


def answering(share: float, *, cost: float = 0.0, seen: list[NDArray[np.float64]] | None = None) -> Measure:
    """Margins gain `share` of what the first order promises; KL rises by `cost` a squared nat."""

    def measure(nats: NDArray[np.float64]) -> Measured:
        if seen is not None:
            seen.append(nats)
        margins = START + share * GAINS @ nats
        return Measured(
            margins, np.where(margins > 1.8, 1.0, 0.5), np.array([0.05, 0.02]), 0.1 + cost * float(nats @ nats)
        )

    return measure


@pytest.mark.parametrize("share", [1.0, 0.5, 0.2])
def test_margins_reach_their_floors_and_a_standard_error(share: float) -> None:
    found = find_lean(answering(share), floors(), lambda: GAINS)
    assert (found.measured.margins >= DENSE + [0.1, 0.04] - 1e-9).all()
    assert (found.measured.margins <= DENSE + 0.3).all()
    assert len(found.rounds) <= 1 + ROUNDS


def test_nothing_is_done_for_a_plan_that_keeps_everything() -> None:
    seen: list[NDArray[np.float64]] = []

    def refuse() -> NDArray[np.float64]:
        raise AssertionError

    found = find_lean(answering(1.0, seen=seen), floors(0.5), refuse)
    assert found.nats.tolist() == [0.0, 0.0]
    assert len(seen) == 1


def test_where_rounding_cannot_lean_the_plan_is_only_measured() -> None:
    found = find_lean(answering(1.0), floors(), None)
    assert found.nats.tolist() == [0.0, 0.0]
    assert len(found.rounds) == 1


def test_a_behavior_above_its_aim_does_not_pull() -> None:
    found = find_lean(answering(1.0), floors(0.9), lambda: np.diag([4.0, 9.0]))
    assert found.nats[0] > 0
    assert found.nats[1] == 0


def test_text_does_not_pay_more_than_the_room() -> None:
    """All that is wanted would cost three times the room; the best lean within it is taken."""
    full = find_lean(answering(0.5), floors(), lambda: GAINS)
    cost = 3 * ROOM * 0.1 / float(full.nats @ full.nats)
    found = find_lean(answering(0.5, cost=cost), floors(), lambda: GAINS)
    assert found.measured.kl <= 0.1 * (1 + ROOM) + 1e-12
    assert found.measured.kl > 0.1 * (1 + 0.5 * ROOM)
    assert START[0] < found.measured.margins[0] < DENSE[0]


def test_a_share_of_right_decisions_asks_for_the_margin_of_the_original() -> None:
    found = find_lean(answering(0.5), floors(by_margin=False), lambda: GAINS)
    assert found.measured.accuracies.tolist() == [1.0, 1.0]
    assert found.nats[0] > 0


def test_gradients_that_only_fit_their_own_half_bring_no_lean() -> None:
    found = find_lean(answering(1.0), floors(), lambda: -np.eye(2))
    assert found.nats.tolist() == [0.0, 0.0]


def test_aims_do_not_run_after_what_the_lean_itself_does_to_pairs() -> None:
    """The spread of the margins grows with lambda; the floor and twice the first standard error are enough."""

    def measure(nats: NDArray[np.float64]) -> Measured:
        found = answering(1.0)(nats)
        return Measured(found.margins, found.accuracies, found.stderr * (1 + 1e3 * nats), found.kl)

    found = find_lean(measure, floors(), lambda: GAINS)
    np.testing.assert_allclose(found.nats, find_lean(answering(1.0), floors(), lambda: GAINS).nats)


def test_behaviors_that_answer_unequally_lean_unequally() -> None:
    """One gets all of its first-order gain, the other a fifth: neither is pushed for the other's sake."""
    share, gains = np.array([1.0, 0.2]), np.diag([4.0, 9.0])

    def measure(nats: NDArray[np.float64]) -> Measured:
        return Measured(START + share * (gains @ nats), np.ones(2), np.array([0.05, 0.02]), 0.1)

    found = find_lean(measure, floors(), lambda: gains)
    aim = DENSE + [0.1, 0.04]
    assert (found.measured.margins >= aim - 1e-3).all()
    assert (found.measured.margins <= aim + 0.03).all()


def test_a_behavior_of_which_little_was_expected_is_not_pushed_by_noise() -> None:
    """It misses its aim by half an error, and falls by one when it leans: that says nothing about its answer."""
    gains, start = np.diag([4.0, 9.0]), np.array([1.4, 3.03])

    def measure(nats: NDArray[np.float64]) -> Measured:
        luck = np.array([0.0, -0.02]) if nats.any() else np.zeros(2)
        return Measured(start + gains @ nats + luck, np.ones(2), np.array([0.05, 0.02]), 0.1)

    found = find_lean(measure, floors(), lambda: gains)
    assert found.measured.margins[1] < DENSE[1] + 0.2
