"""The report's figures as pure functions: data in, SVG text out.

Blue is what was predicted, orange what was measured. Maps are in `maps.py`, the drawing of a figure as SVG in `svg.py`.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from .maps import Cell, bit_map, heat_map, spread_map
from .svg import COLOURS, draw, log_axis, place

__all__ = ["Cell", "bit_map", "check_plot", "heat_map", "pareto_plot", "spread_map", "task_plot"]

Xy = tuple[float, float]


def pareto_plot(
    predicted: Sequence[Xy],
    corrected: Sequence[Xy],
    probes: Sequence[tuple[str, float, float]],
    *,
    plan_predicted: Xy,
    plan_measured: tuple[float, float, float] | None,
    label: str,
) -> str:
    """KL against bits per weight: the front as predicted and corrected, measured probes, and this plan.

    Points are (bits, nats), probes (name, bits, measured nats), `plan_measured` (bits, nats, standard error). Points
    without KL have no place on a logarithmic axis and are left out.
    """

    def paint(figure: Figure) -> None:
        axes = place(figure, 46, 92, 10, 8)
        _line(
            axes, predicted, "predicted: sum of prices", color=COLOURS["predicted"], ls=(0, (4, 2)), lw=1.2, zorder=2.5
        )
        _line(axes, corrected, "corrected by the probes", color=COLOURS["corrected"], ls="-", lw=1.8)
        shown = [(bits, kl) for _, bits, kl in probes if kl > 0]
        if shown:
            style = {"mfc": COLOURS["paper"], "mec": COLOURS["measured"], "ms": 6, "mew": 1.4}
            axes.plot(*zip(*shown, strict=True), "o", label="uniform plans, measured", **style)
        for name, bits, kl in probes:
            if kl > 0:
                at = {"xytext": (7, 3), "textcoords": "offset points", "fontsize": 9, "color": COLOURS["muted"]}
                axes.annotate(name, (bits, kl), **at)
        if plan_predicted[1] > 0:
            style = {"mfc": COLOURS["paper"], "mec": COLOURS["predicted"], "ms": 7, "mew": 1.4}
            axes.plot(*[[value] for value in plan_predicted], "D", label="this plan, predicted", **style)
        if plan_measured is not None and plan_measured[1] > 0:
            bits, kl, error = plan_measured
            style = {"color": COLOURS["measured"], "ms": 7, "elinewidth": 1.4}
            axes.errorbar([bits], [kl], yerr=[min(error, kl * 0.99)], fmt="D", label="this plan, measured", **style)
        log_axis(axes, "y")
        axes.grid(axis="y")
        axes.set_xlabel("bits per weight")
        axes.set_ylabel("KL, nats per token", labelpad=2)
        figure.legend(
            loc="upper left", bbox_to_anchor=(0.01, 0.17), ncols=2, fontsize=9, handlelength=1.6, columnspacing=1
        )

    return draw(paint, height=345, label=label)


def check_plot(points: Sequence[tuple[str, float, float]], *, label: str) -> str:
    """Measured KL of single changes against their price: points are (format, price, measured), both above zero."""
    names = list(dict.fromkeys(name for name, _, _ in points))
    values = np.array([point[1:] for point in points], dtype=np.float64).reshape(-1, 2)
    columns = 5
    legend = 16 * -(-len(names) // columns)  # a row of names takes 14 units

    def paint(figure: Figure) -> None:
        axes = place(figure, 50, 46 + legend, 10, 8)
        low, high = values.min() / 1.6, values.max() * 1.6
        axes.plot([low, high], [low, high], color=COLOURS["muted"], lw=0.8)
        axes.fill_between(
            [low, high], [low / 2, high / 2], [low * 2, high * 2], color=COLOURS["line"], alpha=0.35, lw=0
        )
        for i, name in enumerate(names):
            mine = values[[point[0] == name for point in points]]
            marker, colour = "os^Dv"[i % 5], COLOURS[f"series{i % 3}"]
            axes.plot(mine[:, 0], mine[:, 1], marker, label=name, mfc=colour, mec=COLOURS["paper"], ms=5.5, mew=0.6)
        log_axis(axes, "x")
        log_axis(axes, "y")
        axes.set(xlim=(low, high), ylim=(low, high))
        axes.grid()
        axes.set_xlabel("price (predicted KL), nats per token")
        axes.set_ylabel("measured KL", labelpad=2)
        figure.legend(
            loc="lower left", bbox_to_anchor=(0.1, 0), ncols=columns, fontsize=9, handletextpad=0, columnspacing=1
        )

    return draw(paint, height=324 + legend, label=label)


def task_plot(rows: Sequence[tuple[str, float, float]], *, label: str) -> str:
    """Change of each task's score with its 95 % interval: rows are (name, difference, standard error)."""
    names, change, error = (list(column) for column in zip(*rows, strict=True))
    at = np.arange(len(rows))[::-1]

    def paint(figure: Figure) -> None:
        axes = place(figure, 150, 40, 12, 6)
        axes.axvline(0, color=COLOURS["muted"], lw=0.8)
        style = {"color": COLOURS["measured"], "ms": 5.5, "elinewidth": 1.4}
        axes.errorbar(change, at, xerr=1.96 * np.array(error), fmt="o", **style)
        axes.set_yticks(at, [name if len(name) < 25 else f"{name[:23]}…" for name in names])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(axis="x")
        axes.set_xlabel("change of the score, with its 95 % interval")

    return draw(paint, height=52 + 20 * len(rows), label=label)


def _line(axes, points: Sequence[Xy], name: str, **style) -> None:
    shown = [point for point in points if point[1] > 0]
    if shown:
        axes.plot(*zip(*shown, strict=True), label=name, **style)
