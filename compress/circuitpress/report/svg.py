"""A matplotlib figure as a small inline SVG that takes its colours and its typeface from the page.

1. Figures are drawn with placeholder colours, one for each role of `COLOURS`; in the SVG they become `var(--role)`, so
   that one drawing serves light, dark and paper.
2. Text stays text (no glyph outlines): it can be selected and read aloud, and a page stays small. The page's CSS
   chooses the typeface; sizes are those of the drawing.
3. Groups, ids, comments, fixed sizes and the document-wide style that matplotlib adds are taken out, coordinates are
   rounded to a tenth: about a third of the bytes remain. The same figure gives the same bytes.
"""

import io
import re
from collections.abc import Callable
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

WIDTH = 400.0
"""Units of every figure's width; text is 10 units high, which is legible on a phone and not loud on a screen."""

HEATS = 9
BRIGHT = 6
"""The first step of the price ramp on which text is in the colour `onhigh`."""
BITS = (0, 2, 3, 4, 5, 6, 8, 16)
_NAMES = ("ink", "muted", "line", "paper", "predicted", "corrected", "measured", "series0", "series1", "series2")
_NAMES += tuple(f"heat{i}" for i in range(HEATS)) + ("onlow", "onhigh")
_NAMES += tuple(f"b{bits}" for bits in BITS) + tuple(f"t{bits}" for bits in BITS)
COLOURS = {name: f"#01{i:02x}fe" for i, name in enumerate(_NAMES)}
"""Role -> placeholder colour: ink and paper, kinds of numbers, steps of the price ramp, bits and text on bits."""

_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "circuitpress", "font.family": "DejaVu Sans", "font.size": 10.0,
    "axes.edgecolor": COLOURS["line"], "axes.labelcolor": COLOURS["muted"], "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["line"], "ytick.color": COLOURS["line"], "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"], "axes.spines.top": False, "axes.spines.right": False,
    "grid.color": COLOURS["line"], "grid.linewidth": 0.6, "axes.axisbelow": True, "figure.facecolor": "none",
    "axes.facecolor": "none", "savefig.facecolor": "none", "axes.linewidth": 0.8, "axes.unicode_minus": True,
    "legend.frameon": False, "xtick.major.size": 3.0, "ytick.major.size": 3.0, "axes.labelsize": 10.0,
    "figure.dpi": 72.0, "path.simplify": False,
}  # fmt: skip


def draw(paint: Callable[[Figure], None], *, height: float, label: str) -> str:
    """The SVG of what `paint` draws on an empty figure WIDTH x `height` units; `label` describes it for a reader."""
    with rc_context(_STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        paint(figure)
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(stream.getvalue(), label)


def place(figure: Figure, left: float, bottom: float, right: float, top: float) -> Axes:
    """Axes whose edges lie at these distances, in units, from the edges of the figure."""
    width, height = WIDTH, float(figure.get_figheight()) * 72
    return figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))


def units_of(figure: Figure) -> Axes:
    """Axes without a frame that cover the figure, in its units, with y pointing down."""
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(float(figure.get_figheight()) * 72, 0))
    axes.set_axis_off()
    return axes


def log_axis(axes: Axes, which: str) -> None:
    """A logarithmic axis with plain numbers (0.01, not a power), its ticks thinned to what fits."""
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    low, high = getattr(axes, f"get_{which}lim")()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,), numticks=7))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def plain(value: float) -> str:
    """A number in few characters, for a tick: 0.01, 3.4e-7, 250."""
    return _shorten(f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}")


def two_digits(value: float) -> str:
    """A number to two significant digits, zeros included: 0.010, 3.4e-7, 250."""
    return _shorten(f"{value:#.2g}".removesuffix(".") if abs(value) < 100 else f"{value:.0f}")


def _shorten(text: str) -> str:
    return re.sub(r"e([+-])0*(\d+)", lambda found: f"e{found[1].replace('+', '')}{found[2]}", text)


def _inline(document: bytes, label: str) -> str:
    root = ElementTree.fromstring(document)
    box = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update({"viewBox": box, "role": "img", "aria-label": label, "class": "plot"})
    kinds = {name: f"{_slug(label)}-{i}" for i, name in enumerate(_ids(root))}
    _tidy(root, kinds)
    text = ElementTree.tostring(root, encoding="unicode")
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def _ids(root: ElementTree.Element) -> list[str]:
    """The ids that something refers to, in order."""
    return [node.attrib["id"] for node in root.iter() if "id" in node.attrib and not node.tag.endswith("}g")]


def _slug(label: str) -> str:
    return re.sub(r"[^a-z]+", "-", label.lower())[:24].strip("-")


def _tidy(node: ElementTree.Element, ids: dict[str, str]) -> None:
    """Simplifies the children of `node`, depth first."""
    node.tag = node.tag.rpartition("}")[2]
    node.text = node.text if node.tag in ("text", "tspan") else None
    node.tail = None
    node.attrib = {name.rpartition("}")[2]: _value(name, value, ids) for name, value in node.attrib.items()}
    if node.tag == "g":
        node.attrib.pop("id", None)
    if node.attrib.get("transform", "").startswith("rotate(-0 "):
        del node.attrib["transform"]
    kept: list[ElementTree.Element] = []
    for child in node:
        _tidy(child, ids)
        if child.tag == "style" or (child.tag in ("g", "defs") and not len(child)):
            continue
        kept += list(child) if child.tag == "g" and not child.attrib else [child]
    node[:] = kept


def _value(name: str, value: str, ids: dict[str, str]) -> str:
    name = name.rpartition("}")[2]
    if name == "id":
        return ids.get(value, value)
    if name == "href":
        return "#" + ids[value.removeprefix("#")]
    if name == "clip-path":
        return re.sub(r"#(\w+)", lambda found: "#" + ids[found[1]], value)
    if name in ("d", "x", "y", "width", "height", "transform"):
        value = re.sub(r"\s*\n\s*", "", value) if name == "d" else value
        value = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), value)
    if name == "style":
        value = re.sub(r"font-family: [^;]*;? ?", "", value).replace(": ", ":").replace("; ", ";")
    return value
