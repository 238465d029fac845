"""The picture: well-formed, without scripts, with every part of the circuit in it and inside its frame."""

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from circuitpress.mech.circuits import Circuit, draw_circuit, save_drawing
from circuitpress.mech.circuits.draw import MOST_EDGES
from circuitpress.mech.circuits.graph import Graph

SVG = "{http://www.w3.org/2000/svg}"


def circuit(graph: Graph, nodes: tuple[str, ...], *, scored: bool = True) -> Circuit:
    """All edges between `nodes`, with scores that fall from edge to edge and change their sign."""
    kept = graph.edges_of_nodes(nodes)
    rows = {graph.sender_index[name] for name in nodes}
    kept &= np.array([not owners or bool(rows & set(owners)) for owners in graph.owners])[None]
    count = int(graph.edges.sum())
    scores = -1.0 / np.arange(1, count + 1) * (-1.0) ** np.arange(count)
    return Circuit(
        graph, "nodes", nodes, graph.names(kept), np.zeros(len(graph.nodes)), np.arange(len(graph.nodes)), 0.91,
        "integrated gradients", "causal", {nodes[0]: 0.5}, scores if scored else None, {"behavior": "a < b & c"},
    )  # fmt: skip


def read(text: str) -> ElementTree.Element:
    """The root, after checking what no picture may hold."""
    assert not re.search(r"<script|javascript|\bon\w+=|href|nan|inf\b", text)
    return ElementTree.fromstring(text)


def test_every_part_is_drawn_and_lies_inside(tmp_path: Path) -> None:
    drawn = circuit(Graph((4, 4, 4), (2, 2, 2)), ("L0.head.1", "L0.mlp", "L2.head.3"))
    save_drawing(drawn, tmp_path / "circuit.svg")
    root = read((tmp_path / "circuit.svg").read_text())
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    labels = [text.text for text in root.iter(f"{SVG}text")]
    assert {"L0H1", "L2H3", "MLP 0", "embedding", "logits", "block 0", "block 2"} <= set(labels)
    assert "block 1" not in labels  # nothing of it is in the circuit
    assert "L0H0" in labels  # an outline, since there are few heads
    assert any("a < b & c" in (label or "") for label in labels)
    for box in root.iter(f"{SVG}rect"):
        x, y = float(box.get("x", 0)), float(box.get("y", 0))
        assert x >= 0 and x + float(box.attrib["width"]) <= width
        assert y >= 0 and y + float(box.attrib["height"]) <= height
    ends = sum(1 for sender, receiver in drawn.edges for _ in [sender])
    assert len(list(root.iter(f"{SVG}path"))) == ends
    titles = [title.text or "" for title in root.iter(f"{SVG}title")]
    assert any("faithfulness loses 0.500" in title for title in titles)
    assert sum("→" in title for title in titles) == ends


def test_width_follows_the_score_and_dashes_its_sign() -> None:
    drawn = circuit(Graph((2,), (1,)), ("L0.head.0", "L0.mlp"))
    scores = drawn.scored_edges()
    by_title = {}
    for path in read(draw_circuit(drawn)).iter(f"{SVG}path"):
        title = path.find(f"{SVG}title")
        assert title is not None and title.text is not None
        by_title[title.text.split(":")[0]] = path
    edges = sorted(drawn.edges, key=lambda edge: -abs(scores[edge]))
    widths = [float(by_title[f"{s} → {r}"].attrib["stroke-width"]) for s, r in edges]
    assert widths == sorted(widths, reverse=True) and widths[0] > 2 * widths[-1]
    for s, r in edges:
        assert ("stroke-dasharray" in by_title[f"{s} → {r}"].attrib) == (scores[s, r] > 0)


@pytest.mark.parametrize("scored", [True, False])
def test_a_large_circuit_shows_its_strongest_lines(scored: bool) -> None:
    graph = Graph((32,) * 4, (8,) * 4)
    drawn = circuit(graph, graph.nodes[::3], scored=scored)
    text = draw_circuit(drawn)
    root = read(text)
    assert len(list(root.iter(f"{SVG}path"))) == MOST_EDGES
    assert f"the {MOST_EDGES} strongest of" in text
    assert "L0H1<" not in text  # of so many heads, only those of the circuit


def test_a_group_feeds_each_of_its_heads_in_the_circuit() -> None:
    graph = Graph((4,), (2,))
    drawn = circuit(graph, ("L0.head.2", "L0.head.3"))
    titles = [title.text or "" for title in read(draw_circuit(drawn)).iter(f"{SVG}title")]
    assert sum(title.startswith("embed → L0.kv_group.1.k") for title in titles) == 2
    assert not any("kv_group.0" in title for title in titles)
