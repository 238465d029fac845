"""What differs between two models, from audit.json alone: a page of its own, and a part of a run's report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from .svg import BRIGHT, COLOURS, HEATS, draw, place
from .values import Row, nats

Json = Mapping[str, Any]


def build_audit(document: Json) -> dict[str, Any]:
    """What the templates show under the name `audit`, for the content of audit.json."""
    found, patterns = document["fidelity"], document.get("patterns", [])
    return {
        "model": _name(document["model"]),
        "reference": _name(document["reference"]),
        "kl": nats(found["kl"]),
        "top1": f"{found['top1_agreement']:.1%}",
        "perplexity": f"{found['perplexity']:.2f}",
        "reference_perplexity": f"{found['reference_perplexity']:.2f}",
        "tokens": f"{found['tokens']:,}",
        "cannot_prove": document["cannot_prove"],
        "behaviors": [_behavior(row) for row in document["behaviors"]],
        "able": sum(row["able"] for row in document["behaviors"]),
        "lost_behaviors": [row["name"] for row in document["behaviors"] if row["lost"]],
        "safety": any(row.get("safety") for row in document["behaviors"]),
        "circuits": [line for row in document.get("circuits", []) for line in _circuit(row)],
        "circuit_count": len(document.get("circuits", [])),
        "circuit_reasons": [row["model"]["reason"] for row in document.get("circuits", []) if "reason" in row["model"]],
        "lost_circuits": [row["behavior"] for row in document.get("circuits", []) if row["lost"]],
        "layers": [_layer(row) for row in document.get("layers", [])],
        "layer_plot": _layer_plot(document["layers"]) if document.get("layers") else None,
        "head_plot": _head_plot(document["heads"]) if document.get("heads") else None,
        "patterns": [_pattern(row) for row in patterns],
        "lost_patterns": sum(row["lost"] for row in patterns),
        "features": _features(document["features"]) if "features" in document else None,
    }


def _name(model: str) -> str:
    path = Path(model)
    return f"{path.parent.name}/{path.name}" if path.name in ("model", "checkpoint") else path.name


def _behavior(row: Json) -> Row:
    verdict = "LOST" if row["lost"] else "kept" if row["able"] else "not there"
    change = f"{row['accuracy'] - row['reference_accuracy']:+.1%} ± {row['stderr']:.1%}"
    cells = (f"{row['reference_accuracy']:.1%}", f"{row['accuracy']:.1%}", change)
    margins = (f"{row['reference_mean']:.2f}", f"{row['mean']:.2f}")
    return Row(row["name"], (verdict, *cells, *margins, str(row["pairs"])))


def _circuit(row: Json) -> list[Row]:
    """The circuit in the reference, then in the model; what could not be measured has no figures there."""
    was, is_now = row["reference"], row["model"]
    size = f"{row['size']} {row['granularity']}"
    rows = [Row(f"{row['behavior']}, reference", (size, "", *_sides(was)))]
    if "reason" in is_now:
        return [*rows, Row("model", ("", "LOST", "", "", ""))]
    return [*rows, Row("model", ("", "CHANGED" if row["lost"] else "holds", *_sides(is_now)))]


def _sides(side: Json) -> tuple[str, str, str]:
    return _faithful(side), f"{side['left']:.2f}", f"{side['whole']:.2f}"


def _faithful(side: Json) -> str:
    found = side["faithfulness"]
    return f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def _layer(row: Json) -> Row:
    cells = (f"{row['difference']:.1%}", f"{row['cosine']:.4f}", nats(row["lens_kl"]), f"{row['lens_agreement']:.1%}")
    return Row(str(row["blocks"]), cells)


def _pattern(row: Json) -> Row:
    name = row["pattern"].replace("_", " ").replace("first position", "sink (first position)")
    verdict = "LOST" if row["lost"] else "holds"
    return Row(f"L{row['layer']}.head.{row['head']}", (verdict, name, f"{row['before']:.2f}", f"{row['after']:.2f}"))


def _features(found: Json) -> dict[str, Any]:
    rows = [
        Row(
            str(row["feature"]),
            (f"{row['correlation']:.2f}", f"{row['reference_rate']:.2%}", f"{row['rate']:.2%}"),
        )
        for row in found["worst"]
    ]
    return {
        "site": found["site"],
        "told": f"{found['told']:,} of {found['features']:,}",
        "survivors": f"{found['survivors']:.1%}",
        "rows": rows,
    }


def _layer_plot(rows: Sequence[Json]) -> str:
    blocks = [row["blocks"] for row in rows]

    def paint(figure: Figure) -> None:
        for at, key, label, role in (
            (0, "lens_kl", "logit lens: KL, nats", "measured"),
            (1, "difference", "states: |x - x'| / |x|", "predicted"),
        ):
            axes = place(figure, 52, 36 + 128 * (1 - at), 10, 8 + 128 * at)
            axes.plot(blocks, [row[key] for row in rows], "o-", color=COLOURS[role], ms=3.5, lw=1.5)
            axes.set_ylabel(label)
            axes.set_ylim(0, None)
            axes.grid(axis="y")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if at:
                axes.set_xlabel("blocks run")

    return draw(paint, height=280, label="Difference of the two models above every block")


def _head_plot(heads: Sequence[Json]) -> str:
    layers, per = 1 + max(row["layer"] for row in heads), 1 + max(row["head"] for row in heads)
    high = max(row["distance"] for row in heads) or 1.0

    def paint(figure: Figure) -> None:
        axes = place(figure, 40, 34, 8, 6)
        for row in heads:
            step = min(HEATS - 1, int(HEATS * row["distance"] / high))
            axes.add_patch(
                Rectangle((row["head"] - 0.48, row["layer"] - 0.46), 0.96, 0.92, color=COLOURS[f"heat{step}"])
            )
            if per <= 12:
                ink = COLOURS["onlow" if step < BRIGHT else "onhigh"]
                axes.text(
                    row["head"], row["layer"], f"{row['distance']:.2f}", ha="center", va="center", color=ink, size=8
                )
        axes.set(xlim=(-0.5, per - 0.5), ylim=(layers - 0.5, -0.5), xlabel="head", ylabel="layer")
        axes.set_xticks(range(0, per, max(1, per // 16)))
        axes.set_yticks(range(0, layers, max(1, layers // 16)))

    return draw(paint, height=40 + max(90, 18 * layers), label="How far the attention patterns of heads moved")
