"""Maps of the model, blocks downwards: where the bits went, what matrices cost, what heads and neurons are worth."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from numpy.typing import NDArray

from .svg import BITS, BRIGHT, COLOURS, HEATS, WIDTH, draw, log_axis, place, two_digits, units_of

LEFT, TOP = 28.0, 20.0
LEGEND = 5  # entries of a legend's line


@dataclass(frozen=True)
class Cell:
    """A run of weights of one matrix in one format: `bits` nominal, `numel` weights."""

    layer: int
    role: str
    bits: float
    numel: int
    protected: bool = False


def bit_map(cells: Sequence[Cell], roles: Sequence[str], *, label: str) -> str:
    """Every matrix as a cell in its block's row: area is the number of weights, colour the bits; outlines, protected.

    Cells of one matrix are drawn side by side in the order given.
    """
    layers = sorted({cell.layer for cell in cells})
    high = _row_height(len(layers))
    widest = max(sum(cell.numel for cell in cells if cell.layer == layer) for layer in layers)
    scale = (WIDTH - LEFT) / widest

    def paint(figure: Figure) -> None:
        axes = units_of(figure)
        boxes: dict[int, list[tuple[float, float, float, float]]] = {}
        for row, layer in enumerate(layers):
            x, y = LEFT, TOP + row * high
            _layer_label(axes, layer, y + high / 2, row, len(layers), high)
            for role in roles:
                mine = [cell for cell in cells if cell.layer == layer and cell.role == role]
                if row == 0 and mine:
                    axes.text(x + 1, TOP - 6, role, color=COLOURS["muted"], va="baseline")
                for cell in mine:
                    width = cell.numel * scale
                    box = (x, y, max(width - 1, width * 0.7), high - 1)
                    boxes.setdefault(bit_class(cell.bits), []).append(box)
                    _mark(axes, cell, box)
                    x += width
        for bits, group in boxes.items():
            axes.add_patch(_boxes(group, f"b{bits}"))
        _bit_legend(axes, cells, TOP + len(layers) * high + 18)

    lines = 1 + (len({cell.bits for cell in cells}) - 1) // LEGEND
    return draw(paint, height=TOP + len(layers) * high + 15 + 15 * lines, label=label)


def heat_map(values: NDArray[np.float64], rows: Sequence[int], columns: Sequence[str], *, unit: str, label: str) -> str:
    """`values` [rows, columns] in shades of a logarithmic scale, the number in every cell that has room; nan is empty.

    `rows` are layer numbers, `columns` names (an empty name is not written), `unit` goes beside the scale.
    """
    high = _row_height(len(rows))
    edges = heat_edges(values)
    wide = (WIDTH - LEFT) / max(len(columns), 1)

    def paint(figure: Figure) -> None:
        axes = units_of(figure)
        boxes: dict[int, list[tuple[float, float, float, float]]] = {}
        for j, name in enumerate(columns):
            if name:
                axes.text(LEFT + (j + 0.5) * wide, TOP - 6, name, color=COLOURS["muted"], ha="center", va="baseline")
        for i, layer in enumerate(rows):
            y = TOP + i * high
            _layer_label(axes, layer, y + high / 2, i, len(rows), high)
            for j, value in enumerate(values[i]):
                if np.isnan(value):
                    continue
                step = int(np.searchsorted(edges[1:-1], value))
                gap = 1 if wide > 6 else 0.3
                boxes.setdefault(step, []).append((LEFT + j * wide, y, wide - gap, high - min(1, gap)))
                if wide >= 34 and high >= 13:
                    colour = COLOURS["onlow" if step < BRIGHT else "onhigh"]
                    middle = (LEFT + (j + 0.5) * wide - 0.5, y + high / 2 - 0.5)
                    axes.text(*middle, two_digits(value), color=colour, ha="center", va="center_baseline", fontsize=9)
        for step, group in sorted(boxes.items()):
            axes.add_patch(_boxes(group, f"heat{step}"))
        _heat_legend(axes, edges, unit, TOP + len(rows) * high + 18)

    return draw(paint, height=TOP + len(rows) * high + 30, label=label)


def spread_map(values: Sequence[NDArray[np.float64]], rows: Sequence[int], *, unit: str, label: str) -> str:
    """Where the values of each row lie on a logarithmic scale: 1st to 99th percentile, middle half, median, largest.

    Values that are not positive are left out.
    """
    high = _row_height(len(rows))

    def paint(figure: Figure) -> None:
        axes = place(figure, LEFT, 34, 8, 6)
        for i, row in enumerate(values):
            kept = row[row > 0]
            if not len(kept):
                continue
            low, first, middle, third, top = np.percentile(kept, [1, 25, 50, 75, 99])
            thick = max(2.0, high * 0.45)
            axes.plot([low, top], [i, i], color=COLOURS["heat4"], lw=1.2, solid_capstyle="butt")
            axes.plot([first, third], [i, i], color=COLOURS["predicted"], lw=thick, solid_capstyle="butt")
            axes.plot([middle], [i], "|", color=COLOURS["paper"], ms=thick, mew=1.5)
            axes.plot([kept.max()], [i], ".", color=COLOURS["predicted"], ms=4)
        log_axis(axes, "x")
        axes.set_ylim(len(rows) - 0.5, -0.5)
        shown = range(0, len(rows), _label_step(len(rows), high))
        axes.set_yticks(list(shown), [str(rows[i]) for i in shown])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_xlabel(unit)

    return draw(paint, height=40 + len(rows) * high, label=label)


def bit_class(bits: float) -> int:
    """The colour class of a number of bits."""
    return next((known for known in BITS if bits <= known), BITS[-1])


def heat_edges(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The limits of the shades, ends included: even in the logarithm, over at most a factor of 10,000."""
    positive = values[np.nan_to_num(values) > 0]
    if not len(positive):
        return np.geomspace(1e-9, 1, HEATS + 1)
    top = float(positive.max())
    return np.geomspace(min(max(float(positive.min()), top / 1e4), top * 0.99), top, HEATS + 1)


def _row_height(rows: int) -> float:
    return float(np.clip(420 / max(rows, 1), 6, 20))


def _label_step(rows: int, high: float) -> int:
    return 1 if high >= 10 else 2 if high * 2 >= 10 else 4 if rows > 8 else 1


def _layer_label(axes: Axes, layer: int, y: float, row: int, rows: int, high: float) -> None:
    if row % _label_step(rows, high) == 0:
        axes.text(LEFT - 7, y, str(layer), color=COLOURS["muted"], ha="right", va="center_baseline")


def _mark(axes: Axes, cell: Cell, box: tuple[float, float, float, float]) -> None:
    x, y, width, height = box
    text = "drop" if cell.bits == 0 else f"{cell.bits:g}"
    if width >= 6.5 * len(text) + 2 and height >= 9:
        colour = COLOURS[f"t{bit_class(cell.bits)}"]
        middle = (x + width / 2, y + height / 2)
        axes.text(*middle, text, color=colour, ha="center", va="center_baseline", fontsize=9)
    if cell.protected:
        for inset, colour in ((1.8, "paper"), (0.6, "ink")):
            frame = (x + inset, y + inset), width - 2 * inset, height - 2 * inset
            axes.add_patch(Rectangle(*frame, fill=False, ec=COLOURS[colour], lw=1.2, zorder=3))


def _boxes(group: Sequence[tuple[float, float, float, float]], colour: str) -> PathPatch:
    """Rectangles (x, y, width, height) of one colour as a single path, which takes a fifth of the bytes."""
    paths = [Path([(x, y), (x + w, y), (x + w, y + h), (x, y + h), (x, y)], closed=True) for x, y, w, h in group]
    edge = COLOURS["muted"] if colour == "b0" else "none"
    return PathPatch(Path.make_compound_path(*paths), facecolor=COLOURS[colour], edgecolor=edge, lw=0.5, zorder=1)


def _bit_legend(axes: Axes, cells: Sequence[Cell], y: float) -> None:
    total = sum(cell.numel for cell in cells)
    for i, bits in enumerate(sorted({cell.bits for cell in cells})):
        share = sum(cell.numel for cell in cells if cell.bits == bits) / total
        percent = f"{share:.0%}" if share >= 0.01 else "<1%"
        text = f"{'drop' if bits == 0 else f'{bits:g} bit'}  {percent}"
        at, down = LEFT + i % LEGEND * 74, y + i // LEGEND * 15
        axes.add_patch(_boxes([(at, down - 8, 9, 9)], f"b{bit_class(bits)}"))
        axes.text(at + 13, down, text, color=COLOURS["muted"], va="baseline", fontsize=9)


def _heat_legend(axes: Axes, edges: NDArray[np.float64], unit: str, y: float) -> None:
    for step in range(HEATS):
        axes.add_patch(_boxes([(LEFT + 50 + step * 14, y - 8, 14, 9)], f"heat{step}"))
    axes.text(LEFT + 44, y, two_digits(edges[0]), color=COLOURS["muted"], ha="right", va="baseline", fontsize=9)
    text = f"{two_digits(edges[-1])}  {unit}"
    axes.text(LEFT + 56 + HEATS * 14, y, text, color=COLOURS["muted"], va="baseline", fontsize=9)
