"""A circuit as one SVG: a row for every block, embedding at the bottom, logits on top, no scripts.

1. Only blocks with nodes of the circuit are drawn; where a model has few heads, those outside it are pale outlines, so
   that one sees what was left out.
2. A line is an edge: its width grows with the square root of the size of its score, its colour says which input it
   enters, dashes that it works against the behavior (its score is above zero). Of very many edges the strongest are
   drawn, and the picture says so.
3. Every node and line has a title that a viewer shows on pointing at it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ...files import write_bytes_atomic
from .circuit import Circuit, Edge
from .graph import EMBED, LOGITS, Graph, layer_of

MOST_EDGES = 160
GHOSTS = 16
"""Heads of a block up to which those outside the circuit are shown."""
_STEP, _BOX, _HIGH, _GAP = 92, 72, 30, 84
_LEFT, _TOP = 96, 92
_COLOURS = {"q": "#2563eb", "k": "#c2410c", "v": "#15803d", "mlp": "#7c3aed", "logits": "#334155"}
_SAYS = {"q": "into q", "k": "into k", "v": "into v", "mlp": "into an MLP", "logits": "into the logits"}


@dataclass(frozen=True)
class _Place:
    """Where a node stands: its centre and what is written in it."""

    x: float
    y: float
    label: str


def draw_circuit(circuit: Circuit) -> str:
    """The SVG of a circuit."""
    places, rows, width, height = _layout(circuit)
    lines = list(_edges(circuit, places))
    hidden = sum(1 for _ in _ends(circuit)) - len(lines)
    title = f"{circuit.provenance.get('behavior', 'circuit')}: {len(circuit.nodes)} nodes, {len(circuit.edges)} edges"
    if hidden:
        title += f" (the {len(lines)} strongest of {len(lines) + hidden} lines)"
    about = f"faithfulness {circuit.faithfulness:.3f} (causal) · ranked by {circuit.method}"
    about += ", chosen by ablation" if circuit.evidence == "causal" else ", nothing ablated"
    about += " · widths: gradient" if circuit.edge_scores is not None else ""
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" aria-label="{escape(title)}" '
        'font-family="DejaVu Sans, Helvetica, sans-serif">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
        f'<text x="24" y="32" font-size="17" font-weight="bold" fill="#0f172a">{escape(title)}</text>',
        f'<text x="24" y="53" font-size="12" fill="#475569">{escape(about)}</text>',
        *_legend(),
        *(
            f'<rect x="12" y="{top:.0f}" width="{width - 24:.0f}" height="{tall:.0f}" rx="8" fill="#f8fafc"/>'
            f'<text x="24" y="{top + tall / 2 + 4:.0f}" font-size="12" fill="#64748b">{escape(text)}</text>'
            for top, tall, text in rows
        ),
        *lines,
        *_nodes(circuit, places),
        "</svg>",
    ]
    return "\n".join(out) + "\n"


def save_drawing(circuit: Circuit, path: Path) -> None:
    """Writes circuit.svg."""
    write_bytes_atomic(path, draw_circuit(circuit).encode())


def _layout(circuit: Circuit) -> tuple[dict[str, _Place], list[tuple[float, float, str]], float, float]:
    """Places by node, bands (top, height, text) of the blocks, and the size of the picture."""
    shown: dict[int, list[str]] = {}
    for layer in sorted({layer_of(node) for node in circuit.nodes}):
        inside = [node for node in circuit.nodes if ".head." in node and layer_of(node) == layer]
        every = [circuit.graph.senders[row] for row in circuit.graph.heads_of(layer)]
        shown[layer] = every if len(every) <= GHOSTS else inside
    widest = max([3, *(len(heads) for heads in shown.values())])
    width = max(780.0, _LEFT + (widest + 1.6) * _STEP + 32)
    # Heads in the middle, MLPs in a column of their own on the right: lines between heads do not cross them.
    side = width - 32 - _STEP * 0.75
    middle = (_LEFT + side - _STEP * 0.75) / 2
    places: dict[str, _Place] = {}
    bands: list[tuple[float, float, str]] = []
    y = float(_TOP + 16)
    places[LOGITS] = _Place(middle, y, "logits")
    for layer in sorted(shown, reverse=True):
        top = y + _HIGH / 2 + 36
        y = top + 26
        places[f"L{layer}.mlp"] = _Place(side, y, f"MLP {layer}")
        y += _GAP * 0.6
        heads = shown[layer]
        for i, head in enumerate(heads):
            x = middle + (i - (len(heads) - 1) / 2) * _STEP
            places[head] = _Place(x, y, f"L{layer}H{head.rsplit('.', 1)[1]}")
        bands.append((top, y + _HIGH / 2 + 14 - top, f"block {layer}"))
    y += _GAP
    places[EMBED] = _Place(middle, y, "embedding")
    return places, bands, width, y + _HIGH / 2 + 24


def _nodes(circuit: Circuit, places: dict[str, _Place]) -> Iterator[str]:
    inside = {*circuit.nodes, EMBED, LOGITS}
    for node, place in places.items():
        own = node in inside
        fill, edge, ink = ("#e0f2fe", "#0369a1", "#0c4a6e") if own else ("#ffffff", "#cbd5e1", "#94a3b8")
        if own and node.endswith(".mlp"):
            fill, edge, ink = "#ede9fe", "#6d28d9", "#4c1d95"
        elif node in (EMBED, LOGITS):
            fill, edge, ink = "#f1f5f9", "#334155", "#0f172a"
        width = _BOX if ".head." in node else _BOX + 28
        need = circuit.necessity.get(node)
        says = f"{node}: {'in the circuit' if own else 'not in the circuit'}"
        says += "" if need is None else f"; without it faithfulness loses {need:.3f}"
        yield (
            f'<g><title>{escape(says)}</title><rect x="{place.x - width / 2:.1f}" y="{place.y - _HIGH / 2:.1f}" '
            f'width="{width}" height="{_HIGH}" rx="7" fill="{fill}" stroke="{edge}" '
            f'stroke-width="{1.6 if own else 1}"/>'
            f'<text x="{place.x:.1f}" y="{place.y + 5:.1f}" font-size="13" text-anchor="middle" fill="{ink}">'
            f"{escape(place.label)}</text></g>"
        )


def _ends(circuit: Circuit) -> Iterator[tuple[Edge, str, str]]:
    """Each edge, the node that it enters and the kind of input; an edge into a group enters each of its heads."""
    inside = set(circuit.nodes)
    for edge in circuit.edges:
        for node, kind in _receivers(circuit.graph, edge[1]):
            if node in inside or node == LOGITS:
                yield edge, node, kind


def _receivers(graph: Graph, receiver: str) -> list[tuple[str, str]]:
    if receiver == LOGITS:
        return [(LOGITS, "logits")]
    kind = "mlp" if receiver.endswith(".mlp") else receiver[-1]
    return [(graph.senders[row], kind) for row in graph.owners[graph.receiver_index[receiver]]]


def _edges(circuit: Circuit, places: dict[str, _Place]) -> Iterator[str]:
    scores = circuit.scored_edges()
    ends = sorted(_ends(circuit), key=lambda end: -abs(scores.get(end[0], 0.0)))[:MOST_EDGES]
    most = max((abs(scores.get(edge, 0.0)) for edge, _, _ in ends), default=0.0)
    for edge, node, kind in reversed(ends):
        score = scores.get(edge)
        share = 0.35 if score is None or most == 0 else (abs(score) / most) ** 0.5
        start, stop = places[edge[0]], places[node]
        x0, y0 = start.x, start.y - _HIGH / 2
        x1, y1 = stop.x + {"q": -20, "k": 0, "v": 20}.get(kind, 0), stop.y + _HIGH / 2
        bend = max(28.0, (y0 - y1) * 0.45)
        # A line up one column across a block would run behind the boxes there: it is led around them.
        aside = -_STEP * 0.8 if abs(x0 - x1) < 30 and y0 - y1 > 1.5 * _GAP else 0.0
        dash = ' stroke-dasharray="6 4"' if score is not None and score > 0 else ""
        says = f"{edge[0]} → {edge[1]}" + ("" if score is None else f": {score:+.3g}")
        yield (
            f'<path d="M{x0:.1f} {y0:.1f}C{x0 + aside:.1f} {y0 - bend:.1f} {x1 + aside:.1f} {y1 + bend:.1f} '
            f'{x1:.1f} {y1:.1f}" fill="none" stroke="{_COLOURS[kind]}" stroke-width="{0.8 + 5 * share:.2f}" '
            f'stroke-opacity="{0.25 + 0.55 * share:.2f}"{dash}><title>{escape(says)}</title></path>'
        )


def _legend() -> Iterator[str]:
    x = 24
    for kind, colour in _COLOURS.items():
        yield f'<line x1="{x}" y1="72" x2="{x + 22}" y2="72" stroke="{colour}" stroke-width="4"/>'
        yield f'<text x="{x + 28}" y="76" font-size="12" fill="#475569">{_SAYS[kind]}</text>'
        x += 40 + 7 * len(_SAYS[kind])
    yield f'<line x1="{x}" y1="72" x2="{x + 22}" y2="72" stroke="#475569" stroke-width="2" stroke-dasharray="6 4"/>'
    yield f'<text x="{x + 28}" y="76" font-size="12" fill="#475569">works against it</text>'
