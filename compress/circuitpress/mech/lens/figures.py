"""One figure for each view of `inspect`, drawn from its json alone; every figure carries what it cannot prove.

Matplotlib's figures are used without pyplot, so there is no list of open figures to clean up, and with a fixed salt for
the names inside an SVG, so that the same numbers are the same bytes.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...files import atomic

Document = Mapping[str, Any]


def draw(document: Document, path: Path) -> None:
    """Writes the figure of `document` (its `view` says which) to `path`, svg or png by its ending."""
    figure = _VIEWS[document["view"]](document)
    width = figure.get_size_inches()[0]
    caption = f"{document['evidence'].capitalize()} evidence. {document['cannot_prove']}"
    figure.text(0.01, 0.005, textwrap.fill(caption, int(width * 17)), fontsize=7, color="0.35", va="bottom")
    with atomic(path) as partial, matplotlib.rc_context({"svg.hashsalt": "circuitpress"}):
        kind = path.suffix.removeprefix(".")
        figure.savefig(partial, format=kind, metadata={"Date": None} if kind == "svg" else None)


def _figure(rows: int, columns: int, *, width: float, height: float, title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    # The last strip of the page is the caption's.
    figure.get_layout_engine().set(rect=(0, 0.5 / height, 1, 1 - 0.5 / height))  # pyright: ignore
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _lens(document: Document) -> Figure:
    rows = document["depths"]
    figure, panels = _figure(1, 2, width=9, height=3.9, title=f"Logit lens, {document['model']}")
    depth = [row["blocks"] for row in rows]
    left, right = panels[0]
    left.errorbar(depth, [row["kl"] for row in rows], yerr=[row["kl_stderr"] or 0 for row in rows], marker="o")
    left.set(xlabel="blocks run", ylabel="KL(final || lens), nats per token", ylim=(0, None))
    right.plot(depth, [row["top1_agreement"] for row in rows], marker="o")
    right.set(xlabel="blocks run", ylabel="share with the final top token", ylim=(0, 1.03))
    for panel in (left, right):
        panel.grid(color="0.9")
        panel.set_xticks(depth[:: max(1, len(depth) // 12)])
    return figure


def _attention(document: Document) -> Figure:
    heads, shown = document["heads"], document["patterns"]
    layers, per = 1 + max(row["layer"] for row in heads), 1 + max(row["head"] for row in heads)
    names = ("previous_token", "induction", "duplicate", "first_position")
    title = f"Attention, {document['model']}: scores on repeated random tokens; patterns (query down, key across)"
    columns = 4
    rows = 1 + -(-len(shown) // columns)
    figure, panels = _figure(rows, columns, width=11, height=0.9 + 2.6 * rows, title=title)
    for panel, name in zip(panels[0], names, strict=True):
        values = [[0.0] * per for _ in range(layers)]
        for row in heads:
            values[row["layer"]][row["head"]] = row[name]
        _grid(panel, values, name.replace("_", " "), low=0, high=1)
    for panel, row in zip(panels[1:].ravel(), shown, strict=False):
        panel.imshow(row["weights"], cmap="viridis", vmin=0, aspect="equal", interpolation="nearest")
        panel.set_title(f"L{row['layer']}H{row['head']}: {row['why'].replace('_', ' ')}", fontsize=8)
        panel.tick_params(labelsize=6)
    for panel in panels[1:].ravel()[len(shown) :]:
        panel.set_visible(False)
    return figure


def _grid(panel: Axes, values: Sequence[Sequence[float]], title: str, *, low: float, high: float) -> None:
    """A matrix of layers (down) by heads (across), each cell with its number where there is room."""
    diverging = low < 0
    image = panel.imshow(values, cmap="coolwarm" if diverging else "Blues", vmin=low, vmax=high, aspect="auto")
    panel.set_title(title, fontsize=8)
    panel.set(xlabel="head", ylabel="layer")
    panel.set_xticks(range(len(values[0])))
    panel.set_yticks(range(len(values)))
    panel.tick_params(labelsize=6)
    if len(values) * len(values[0]) <= 80:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                dark = abs(value) > 0.6 * max(abs(low), abs(high))
                panel.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6, color="w" if dark else "0.2")
    image.set_rasterized(False)


def _residual(document: Document) -> Figure:
    rows = document["parts"]
    figure, panels = _figure(1, 2, width=11, height=4.2, title=f"Residual stream, {document['model']}")
    left, right = panels[0]
    names = [row["part"] for row in rows]
    at = range(len(rows))
    # Nothing is there before the embedding.
    left.plot(at[1:], [row["stream_norm"] for row in rows[1:]], label="stream before it", color="0.4")
    left.plot(at, [row["norm"] for row in rows], "o", label="what it writes", markersize=4)
    left.plot(at, [row["first_norm"] for row in rows], "x", label="what it writes at the first position", markersize=4)
    left.set(ylabel="mean norm", yscale="symlog" if any(row["norm"] == 0 for row in rows) else "log")
    left.legend(fontsize=7)
    right.bar(at, [row["share"] for row in rows], color=["0.5", *(["C0", "C1"] * len(rows))][: len(rows)])
    right.set(ylabel="share of the final stream (all sum to 1)")
    for panel in (left, right):
        panel.set_xticks(list(at), names, rotation=90, fontsize=6)
        panel.grid(axis="y", color="0.9")
    return figure


def _weights(document: Document) -> Figure:
    heads, pairs = document["heads"], document["strongest"]
    layers, per = 1 + max(row["layer"] for row in heads), 1 + max(row["head"] for row in heads)
    figure, panels = _figure(1, 3, width=12, height=4.2, title=f"Weights of heads, {document['model']}")
    largest = max(row["ov_effective"] for row in heads)
    for panel, name, title, low, high in (
        (panels[0, 0], "copying", "OV copying score", -1, 1),
        (panels[0, 1], "ov_effective", "OV effective directions", 0, largest),
    ):
        values = [[0.0] * per for _ in range(layers)]
        for row in heads:
            values[row["layer"]][row["head"]] = row[name]
        _grid(panel, values, title, low=low, high=high)
    panel = panels[0, 2]
    labels = [f"{row['writer']} to {row['reader']} ({row['through']})" for row in pairs]
    panel.barh(range(len(pairs)), [row["score"] for row in pairs])
    panel.axvline(document["random_composition"], color="C3", linewidth=1, label="random heads")
    panel.set_yticks(range(len(pairs)), labels, fontsize=6)
    panel.invert_yaxis()
    panel.set_title("strongest compositions", fontsize=8)
    panel.legend(fontsize=7, loc="lower right")
    return figure


def _probe(document: Document) -> Figure:
    rows = document["places"]
    figure, panels = _figure(1, 1, width=8, height=4, title=f"Linear probe, {document['model']}: {document['task']}")
    panel, at = panels[0, 0], range(len(rows))
    panel.plot(at, [row["accuracy"] for row in rows], marker="o", label="task, held-out windows")
    panel.plot(at, [row["control"] for row in rows], marker="s", label="control: random class per token type")
    panel.plot(at, [row["majority"] for row in rows], color="0.5", linestyle="--", label="largest class")
    panel.set_xticks(list(at), [row["place"] for row in rows], rotation=30, fontsize=7, ha="right")
    panel.set(ylabel="accuracy")
    panel.grid(color="0.9")
    panel.legend(fontsize=7)
    return figure


def _text(document: Document) -> Figure:
    parts = document["parts"]
    lines = sum(2 + len(row["top"]) + len(row["control"]) for row in parts)
    height = 0.8 + 0.17 * max(6, lines)
    figure, panels = _figure(1, 1, width=9, height=height, title=f"Text that activates, {document['model']}")
    panel = panels[0, 0]
    panel.set(xlim=(0, 112), ylim=(max(6, lines), 0))
    panel.axis("off")
    y = 0.5
    for row in parts:
        title = f"{row['part']}   fires on {100 * row['firing_rate']:.1f} % of tokens, mean {row['mean']:.3g}"
        panel.text(0, y, title, fontsize=8, weight="bold", va="center", parse_math=False)
        y += 1
        highest = max((abs(excerpt["value"]) for excerpt in row["top"]), default=1.0) or 1.0
        for kind in ("top", "control"):
            for excerpt in row[kind]:
                _excerpt(panel, excerpt, y, kind, highest)
                y += 1
        y += 1
    return figure


def _excerpt(panel: Axes, excerpt: Mapping[str, Any], y: float, kind: str, highest: float) -> None:
    """One line: the value at the peak, then the tokens, shaded by their own values."""
    style: dict[str, Any] = {"fontsize": 6.5, "family": "monospace", "va": "center", "parse_math": False}
    panel.text(0, y, f"{'' if kind == 'top' else 'random '}{excerpt['value']:.3g}".rjust(14), color="0.4", **style)
    x = 13.0
    for token, value in zip(excerpt["tokens"], excerpt["values"], strict=True):
        shown = token.replace("\n", "\u21b5").replace("\t", " ")
        strength = min(1.0, abs(value) / highest)
        if strength > 0.02 and shown:
            color = (1, 1 - 0.6 * strength, 1 - strength) if value > 0 else (1 - strength, 1 - 0.5 * strength, 1)
            panel.barh(y, 0.73 * len(shown), left=x, height=0.8, color=color, zorder=0)
        panel.text(x, y, shown, **style)
        x += 0.73 * len(shown)
        if x > 108:
            break


_VIEWS: Mapping[str, Callable[[Document], Figure]] = {
    "lens": _lens,
    "attention": _attention,
    "residual": _residual,
    "weights": _weights,
    "probe": _probe,
    "text": _text,
}
