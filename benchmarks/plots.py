"""Pictures of what `kernels.py` and `speed_gpu.py` measured, drawn from their results files alone.

1. Kernels: microseconds of a product over the batch, one panel for each shape, every number of bits of ours and every
   peer. Dots mark the floor of our 4 bits: their bytes at the bandwidth of a copy. What has no figure is left out.
2. Speed: tokens a second of decoding, one panel for each batch, bars by number of bits and mode. A line above a bar is
   where it would stand if a step took no longer than reading its weights.

Both scripts draw beside their results; this one draws again, from files of other machines too.

    python benchmarks/plots.py benchmarks/results/kernels-GPU.json benchmarks/results/speed-GPU.json
"""

import io
import json
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from circuitpress.files import write_bytes_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
OURS = "circuitpress"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "circuitpress", "font.size": 9.0, "legend.fontsize": 8.0}
"""Text stays text, and the same results give the same bytes."""


@click.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
def main(results: tuple[Path, ...]) -> None:
    """Draws each results file as an SVG of the same name."""
    for path in results:
        click.echo(draw(path))


def draw(path: Path) -> Path:
    """Draws the results at `path` and returns the path of the SVG; ValueError where no row has a figure."""
    document = json.loads(path.read_text())
    rows = document["rows"]
    paint = speed if any("phase" in row for row in rows) else kernels
    figure, title = paint(rows, document.get("gpu", path.stem))
    target = path.with_suffix(".svg")
    write_bytes_atomic(target, titled(figure, title).encode())
    return target


def kernels(rows: Rows, gpu: str) -> "tuple[Callable[[Figure], None], str]":
    """What paints the products of `kernels.py`, and its title."""
    shown = [row for row in rows if row.get("microseconds") and _plain(row["method"])]
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in shown))
    names = list(dict.fromkeys(_name(row) for row in shown))
    batches = sorted({row["batch"] for row in shown})

    def paint(figure: "Figure") -> None:
        from circuitpress.report.svg import log_axis

        for panel, (n, k) in zip(_panels(figure, len(shapes)), shapes, strict=False):
            mine = [row for row in shown if (row["n"], row["k"]) == (n, k)]
            for number, name in enumerate(names):
                points = sorted((row["batch"], row["microseconds"]) for row in mine if _name(row) == name)
                if points:
                    ours = name.startswith(OURS)
                    panel.plot(
                        *zip(*points, strict=True), marker="os^vD"[number % 5], markersize=4, label=name,
                        linestyle="-" if ours else "--", linewidth=1.4 if ours else 1.0, color=f"C{number % 10}",
                    )  # fmt: skip
            floor = sorted(
                (row["batch"], row["microseconds"] * row["floor_fraction"])
                for row in mine
                if (row["method"], row["bits"]) == (OURS, 4)
            )
            if floor:
                panel.plot(*zip(*floor, strict=True), linestyle=":", color="black", label="floor of 4 bits")
            panel.set_xscale("log", base=2)
            panel.set_xticks(batches, map(str, batches))
            log_axis(panel, "y")
            panel.set(xlabel="batch", ylabel="microseconds", title=f"{n} x {k}")
            panel.grid(color="0.9", linewidth=0.5)
        _legend(figure)

    return _some(shown, paint), f"Products with packed matrices on {gpu}: microseconds over batch, for each shape"


def speed(rows: Rows, gpu: str) -> "tuple[Callable[[Figure], None], str]":
    """What paints the decoding of `speed_gpu.py`, and its title."""
    shown = [row for row in rows if row["phase"] == "decode" and row.get("tokens_per_second")]
    batches = list(dict.fromkeys(row["batch"] for row in shown))
    modes = list(dict.fromkeys(row["mode"] for row in shown))
    widths = list(dict.fromkeys(row["bits"] for row in shown))

    def paint(figure: "Figure") -> None:
        size = 0.8 / len(modes)
        for panel, batch in zip(_panels(figure, len(batches)), batches, strict=False):
            for number, mode in enumerate(modes):
                mine = [row for row in shown if (row["batch"], row["mode"]) == (batch, mode)]
                places = [widths.index(row["bits"]) + size * (number - (len(modes) - 1) / 2) for row in mine]
                heights = [row["tokens_per_second"] for row in mine]
                bars = panel.bar(places, heights, 0.9 * size, label=mode, color=f"C{number}")
                panel.bar_label(bars, fmt="%.0f", fontsize=7)
                for place, row in zip(places, mine, strict=True):
                    roof = row["tokens_per_second"] / row["floor_fraction"]
                    panel.hlines(roof, place - size / 2, place + size / 2, color="black", linewidth=1)
            panel.set_xticks(range(len(widths)), widths)
            panel.set(xlabel="bits", ylabel="tokens a second", title=f"batch {batch}")
        _legend(figure)

    model = shown[0]["model"] if shown else ""
    return _some(shown, paint), f"Decoding with {model} on {gpu}: tokens a second by bits and mode, for each batch"


def titled(paint: "Callable[[Figure], None]", title: str) -> str:
    """The SVG of what `paint` draws, under a heading that readers of the page and of the screen get."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(layout="constrained")
        paint(figure)
        figure.suptitle(title, fontsize=10)
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Title": title})
    head = rf'\1 role="img" aria-labelledby="title">\n <title id="title">{escape(title)}</title>'
    return re.sub(r"(<svg [^>]*)>", head, stream.getvalue().decode(), count=1)


def _plain(method: str) -> bool:
    """Whether a row is a product alone: not one with norms and gates around it, no cache, no experts."""
    return method == OURS or not method.startswith(OURS)


def _name(row: dict[str, Any]) -> str:
    return f"{row['method']}, {row['bits']}{'' if row['bits'] == 'mixed' else ' bits'}"


def _some(shown: Rows, paint: "Callable[[Figure], None]") -> "Callable[[Figure], None]":
    if not shown:
        raise ValueError("no row of these results has a figure: a dry run, or everything failed (see `error`)")
    return paint


def _panels(figure: "Figure", count: int) -> list[Any]:
    """`count` axes, at most three beside each other."""
    columns = min(3, count)
    lines = -(-count // columns)
    figure.set_size_inches(4.2 * columns, 3.4 * lines + 1.2)
    panels = list(figure.subplots(lines, columns, squeeze=False).ravel())
    for panel in panels[count:]:
        panel.set_visible(False)
    return panels


def _legend(figure: "Figure") -> None:
    """One legend for all panels: a peer need not have a figure in each."""
    named: dict[Any, Any] = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=4)


if __name__ == "__main__":
    main()
