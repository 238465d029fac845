"""Figures: what is drawn is what the data say; areas to scale, colours by class, marks where numbers put them."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from circuitpress.report.figures import Cell, bit_map, check_plot, heat_map, pareto_plot, spread_map
from circuitpress.report.maps import bit_class, heat_edges
from circuitpress.report.svg import plain, two_digits

SHAPE = re.compile(r"[ML] ?(-?[\d.]+) (-?[\d.]+)")


def areas(svg: str, colour: str) -> float:
    """The area of everything filled with `colour`: shoelace over the rectangles of its path."""
    total = 0.0
    for node in ElementTree.fromstring(svg).iter("path"):
        if f"fill:var(--{colour})" not in node.attrib.get("style", ""):
            continue
        for piece in node.attrib["d"].split("z"):
            xs = [tuple(map(float, point)) for point in SHAPE.findall(piece)]
            total += abs(sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(xs, xs[1:] + xs[:1], strict=True))) / 2
    return total


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg).iter("text")]


def test_bit_map_is_to_scale() -> None:
    cells = [
        Cell(0, "q", 4, 3000),
        Cell(0, "o", 16, 1000),
        Cell(1, "q", 2, 2000),
        Cell(1, "q", 8, 1000, protected=True),
    ]
    svg = bit_map(cells, ("q", "o"), label="bits")
    swatch = 81
    wide = areas(svg, "b4") - swatch
    assert (areas(svg, "b2") - swatch) / wide == pytest.approx(2 / 3, rel=0.02)
    assert (areas(svg, "b16") - swatch) / wide == pytest.approx(1 / 3, rel=0.02)
    assert (areas(svg, "b8") - swatch) / wide == pytest.approx(1 / 3, rel=0.02)
    assert {"q", "o", "0", "1", "2", "4", "8", "16", "4 bit  43%", "16 bit  14%"} <= set(texts(svg))
    assert svg.count("stroke:var(--ink)") == 1


def test_bit_map_with_every_class_and_dropped_parts() -> None:
    kinds = (0, 2, 3, 4, 5, 6, 8, 16)
    svg = bit_map([Cell(0, "q", bits, 500) for bits in kinds], ("q",), label="bits")
    assert all(areas(svg, f"b{bits}") > 81 for bits in kinds)
    assert "drop  12%" in texts(svg)


def test_shares_too_small_to_round_are_not_zero() -> None:
    svg = bit_map([Cell(0, "q", 4, 99_900), Cell(0, "q", 8, 100)], ("q",), label="bits")
    assert "8 bit  <1%" in texts(svg)


@pytest.mark.parametrize(("bits", "name"), [(0, 0), (1.6, 2), (2, 2), (4, 4), (7, 8), (12, 16), (32, 16)])
def test_bit_classes(bits: float, name: int) -> None:
    assert bit_class(bits) == name


def test_heat_map_writes_its_values_and_shades_their_order() -> None:
    values = np.array([[0.5, 0.0001], [np.nan, 0.0]])
    svg = heat_map(values, [3, 7], ["q", ""], unit="nats", label="heat")
    assert {"0.50", "0.00010", "0.0", "3", "7", "q", "0.50  nats"} <= set(texts(svg))
    assert areas(svg, "heat8") > areas(svg, "heat4")  # a legend has one box of each shade


def test_heat_edges_span_at_most_four_decades() -> None:
    edges = heat_edges(np.array([1e-9, 2.0, np.nan, -1.0]))
    assert (edges[0], edges[-1]) == pytest.approx((2e-4, 2.0))
    assert np.diff(np.log(edges)) == pytest.approx(np.log(1e4) / 9)
    for flat in (np.zeros((2, 2)), np.full((2, 2), np.nan), np.full((1, 1), 0.3)):
        assert (np.diff(heat_edges(flat)) > 0).all()
        heat_map(flat, list(range(len(flat))), ["a", "b"][: flat.shape[1]], unit="nats", label="heat")


def test_spread_map_takes_rows_without_positive_values() -> None:
    svg = spread_map([np.array([0.1, 0.2, 0.4]), np.zeros(3), np.array([-1.0])], [0, 1, 2], unit="nats", label="spread")
    assert svg.count("stroke:var(--predicted)") >= 1
    spread_map([np.zeros(3)], [0], unit="nats", label="spread")


def test_pareto_plot_marks_predicted_and_measured() -> None:
    line = [(2.0, 1.0), (3.0, 0.1), (4.0, 0.01), (16.0, 0.0)]
    svg = pareto_plot(
        line, line, [("int3", 3.3, 0.08)], plan_predicted=(3.0, 0.1), plan_measured=(3.0, 0.12, 0.5), label="pareto"
    )
    assert {"int3", "this plan, measured", "this plan, predicted", "bits per weight"} <= set(texts(svg))
    bare = pareto_plot(line, [], [], plan_predicted=(16.0, 0.0), plan_measured=None, label="pareto")
    assert not {"this plan, measured", "corrected by the probes"} & set(texts(bare))


@pytest.mark.parametrize("formats", [1, 5, 12])
def test_the_names_of_formats_stand_below_the_axis(formats: int) -> None:
    points = [(f"int{i}", 10.0**-i, 1.2 * 10.0**-i) for i in range(1, formats + 1)]
    svg = check_plot(points, label="check")
    size = float(re.findall(r'viewBox="0 0 \S+ (\S+)"', svg)[0])
    heights = {text: float(y) for y, text in re.findall(r'y="([-\d.]+)">([^<]*)</text>', svg)}
    names = [heights[name] for name, *_ in points]
    assert min(names) > heights["price (predicted KL), nats per token"] + 12  # no line touches the one above
    assert max(names) < size


def test_check_plot_draws_every_point() -> None:
    points = [("int4g64", 0.1, 0.12), ("int4g64", 0.01, 0.02), ("int3g64", 0.3, 0.3)]
    svg = check_plot(points, label="check")
    assert svg.count("<use") >= 3
    assert {"int4g64", "int3g64"} <= set(texts(svg))


def test_a_label_is_escaped_and_drawings_repeat() -> None:
    cells = [Cell(0, "q", 4, 300)]
    svg = bit_map(cells, ("q",), label='a "b" <c>')
    assert ElementTree.fromstring(svg).attrib["aria-label"] == 'a "b" <c>'
    assert svg == bit_map(cells, ("q",), label='a "b" <c>')


@pytest.mark.parametrize(
    ("value", "short", "two"),
    [(0.01, "0.01", "0.010"), (3.4e-7, "3.4e-7", "3.4e-7"), (250.4, "250", "250"), (12.0, "12", "12"), (0, "0", "0.0")],
)
def test_numbers(value: float, short: str, two: str) -> None:
    assert plain(value) == short
    assert two_digits(value) == two
