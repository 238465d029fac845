"""The picture of a comparison: KL over real bits per weight, one panel for each checkpoint and text."""

from collections.abc import Sequence
from pathlib import Path

from ..files import atomic
from .table import BANDS, OURS, Row

_MARKS = "os^vDP*Xph<>"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Writes `path` (svg or png by its ending). Rows without a figure and those beyond 6 bits are left out."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    keys = list(dict.fromkeys((row["checkpoint"], row["text"]) for row in rows))
    shown = [row for row in rows if row["error"] is None and row["bits_per_weight"] <= 6]
    methods = list(dict.fromkeys(row["method"] for row in sorted(shown, key=lambda row: row["method"] != OURS)))
    figure, axes = pyplot.subplots(
        -(-len(keys) // 2), min(2, len(keys)), figsize=(6.5 * min(2, len(keys)), 4.4 * -(-len(keys) // 2)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    panels = axes.ravel()
    for panel in panels[len(keys) :]:
        panel.set_visible(False)
    for panel, (checkpoint, text) in zip(panels, keys, strict=False):
        for low, high in BANDS:
            panel.axvspan(low, high, color="0.94", zorder=0)
        for number, method in enumerate(methods):
            mine = [
                row for row in shown if (row["checkpoint"], row["text"], row["method"]) == (checkpoint, text, method)
            ]
            points = sorted((row["bits_per_weight"], row["kl"]) for row in mine)
            if points:
                ours, control = method == OURS, method.startswith("control:")
                panel.plot(
                    *zip(*points, strict=True), _MARKS[number % len(_MARKS)], label=method,
                    linestyle="-" if ours else "none", color="black" if ours else f"C{number % 10}",
                    markersize=6 if ours else 5, alpha=0.45 if control else 0.9, zorder=3 if ours else 2,
                )  # fmt: skip
        panel.set(
            yscale="log", xlabel="real bits per weight", ylabel="KL, nats per token", title=f"{checkpoint}, {text}"
        )
        panel.grid(which="both", color="0.88", linewidth=0.5)
    # One legend for all panels: a peer need not run on every checkpoint.
    handles = [panel.get_legend_handles_labels() for panel in panels[: len(keys)]]
    named = {label: handle for pair in handles for handle, label in zip(*pair, strict=True)}
    if named:
        figure.legend(
            list(named.values()), list(named), loc="outside lower center", ncols=min(6, len(named)), fontsize=8
        )
    with atomic(path) as partial:
        figure.savefig(
            partial, format=path.suffix.removeprefix("."), metadata={"Date": None} if path.suffix == ".svg" else None
        )
    pyplot.close(figure)
