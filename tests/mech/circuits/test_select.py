"""Ranking and cutting: signs that depend on the sample come last, greedy grows from the logits."""

import numpy as np
import pytest

from circuitpress.mech.circuits.graph import Graph
from circuitpress.mech.circuits.select import Ranking, greedy, rank, top

GRAPH = Graph((2, 2), (1, 1))


def ranking(scores: dict[tuple[str, str], float]) -> Ranking:
    """All edges, sure of themselves, with these scores and 0.001 for the rest."""
    values = np.array([scores.get(edge, 0.001) for edge in GRAPH.names(GRAPH.edges)])
    order = np.argsort(-np.abs(values), kind="stable")
    return Ranking(values, np.zeros_like(values), np.ones_like(values), order, len(values))


def test_scores_whose_sign_depends_on_the_sample_come_last() -> None:
    draw = np.random.default_rng(1)
    scores = draw.normal(size=(40, 5)).astype(np.float32) * 0.1
    scores[:, 0] += 0.2
    scores[:, 1] -= 0.5
    scores[:, 2] = 0
    scores[:, 3] = 30 * draw.normal(size=40) + 3
    found = rank(scores)
    assert found.order[:2].tolist() == [1, 0]
    assert found.sure == 2
    assert found.order[2] == 3  # the largest of those not to be relied on
    assert np.allclose(found.score, scores.mean(0), atol=1e-6)
    assert np.allclose(found.stderr, scores.std(0, ddof=1) / 40**0.5, atol=1e-6)
    assert found.agreement[1] == 1


def test_one_prompt_is_a_sample_too() -> None:
    found = rank(np.array([[1.0, -3.0, 0.0]], dtype=np.float32))
    assert found.order.tolist() == [1, 0, 2]
    assert found.sure == 2
    assert np.isnan(found.stderr).all()


def test_top_leaves_out_what_hangs_in_the_air() -> None:
    chosen = ranking(
        {("embed", "L0.kv_group.0.v"): 9, ("L0.head.0", "L1.head.1.q"): 8, ("L0.head.1", "L1.mlp"): -7,
         ("L1.head.0", "logits"): 6, ("L1.mlp", "logits"): -5}
    )  # fmt: skip
    mask = top(GRAPH, GRAPH.edges, chosen, 5)
    assert set(GRAPH.names(mask)) == {("embed", "L0.kv_group.0.v"), ("L0.head.1", "L1.mlp"), ("L1.mlp", "logits")}


def test_greedy_takes_only_what_it_has_reached() -> None:
    scores = {
        ("embed", "L0.head.0.q"): 9, ("L0.head.0", "L1.head.1.q"): 8, ("L1.head.0", "logits"): 2,
        ("embed", "L1.head.0.q"): 1, ("embed", "logits"): 0.5,
    }  # fmt: skip
    found = [set(GRAPH.names(greedy(GRAPH, GRAPH.edges, ranking(scores), size))) for size in (1, 2, 3)]
    assert found[0] == set()  # one edge, from a head that nothing feeds
    assert found[1] == {("L1.head.0", "logits"), ("embed", "L1.head.0.q")}
    assert found[2] == found[1] | {("embed", "logits")}


@pytest.mark.parametrize("choose", [top, greedy])
def test_everything_is_everything(choose: object) -> None:
    assert callable(choose)
    assert (choose(GRAPH, GRAPH.edges, ranking({}), 10_000) == GRAPH.edges).all()
