"""The graph: counts by hand, who may read whom, connected parts against paths enumerated one by one."""

from itertools import pairwise

import numpy as np
import pytest

from circuitpress.mech.circuits.graph import EMBED, LOGITS, Graph, heads_by_layer, layer_of

GRAPH = Graph((4, 2), (2, 1))


def reads(sender: str, receiver: str) -> bool:
    """Whether `sender` writes before `receiver` reads, from the names alone."""
    if sender == EMBED or receiver == LOGITS:
        return True
    at, to = layer_of(sender), layer_of(receiver)
    same = ".head." in sender and receiver.endswith(".mlp")
    return at < to or (at == to and same)


def test_names_and_edges() -> None:
    assert GRAPH.senders == (
        "embed", "L0.head.0", "L0.head.1", "L0.head.2", "L0.head.3", "L0.mlp", "L1.head.0", "L1.head.1", "L1.mlp"
    )  # fmt: skip
    assert GRAPH.receivers[:9] == (
        "L0.head.0.q", "L0.head.1.q", "L0.head.2.q", "L0.head.3.q", "L0.kv_group.0.k", "L0.kv_group.1.k",
        "L0.kv_group.0.v", "L0.kv_group.1.v", "L0.mlp",
    )  # fmt: skip
    assert GRAPH.receivers[9:] == (
        "L1.head.0.q", "L1.head.1.q", "L1.kv_group.0.k", "L1.kv_group.0.v", "L1.mlp", "logits",
    )  # fmt: skip
    expected = [[reads(sender, receiver) for receiver in GRAPH.receivers] for sender in GRAPH.senders]
    assert GRAPH.edges.tolist() == expected


def test_owners_follow_the_groups() -> None:
    owners = dict(zip(GRAPH.receivers, GRAPH.owners, strict=True))
    names = {receiver: [GRAPH.senders[row] for row in rows] for receiver, rows in owners.items()}
    assert names["L0.kv_group.1.v"] == ["L0.head.2", "L0.head.3"]
    assert names["L0.head.2.q"] == ["L0.head.2"]
    assert names["L1.kv_group.0.k"] == ["L1.head.0", "L1.head.1"]
    assert names["L1.mlp"] == ["L1.mlp"]
    assert names["logits"] == []


def test_masks_and_names_are_inverse() -> None:
    edges = (("embed", "L0.mlp"), ("L0.mlp", "L1.kv_group.0.v"), ("L1.head.1", "logits"))
    assert GRAPH.names(GRAPH.mask(edges)) == edges
    assert GRAPH.nodes_of(GRAPH.mask(edges)) == ("L0.mlp", "L1.head.1")
    kept = GRAPH.edges_of_nodes(["L1.mlp"])
    assert kept.sum() == len(GRAPH.receivers) + 1
    with pytest.raises(ValueError, match="L1.mlp does not write before L0.mlp reads"):
        GRAPH.mask([("L1.mlp", "L0.mlp")])
    with pytest.raises(KeyError):
        GRAPH.mask([("L7.mlp", "logits")])


@pytest.mark.parametrize("seed", range(8))
def test_connected_edges_are_those_on_some_path(seed: int) -> None:
    mask = GRAPH.edges & (np.random.default_rng(seed).random(GRAPH.edges.shape) < 0.15)
    edges = set(GRAPH.names(mask))
    into = {
        name: [GRAPH.senders[row] for row in rows] for name, rows in zip(GRAPH.receivers, GRAPH.owners, strict=True)
    }

    def paths(node: str) -> list[list[tuple[str, str]]]:
        """All ways from `node` to the logits."""
        found = []
        for sender, receiver in edges:
            if sender == node:
                ends = [[]] if receiver == LOGITS else [rest for owner in into[receiver] for rest in paths(owner)]
                found += [[(sender, receiver), *rest] for rest in ends]
        return found

    every = paths(EMBED)
    assert all(a[1] == LOGITS or b[0] in into[a[1]] for path in every for a, b in pairwise(path))
    assert set(GRAPH.names(GRAPH.connected(mask))) == {edge for path in every for edge in path}


def test_heads_by_layer() -> None:
    assert heads_by_layer(["L0.head.1", "L1.mlp", "L1.head.0", "L0.head.3"]) == {
        0: ("L0.head.1", "L0.head.3"),
        1: ("L1.head.0",),
    }
