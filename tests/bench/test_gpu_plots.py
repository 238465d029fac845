"""benchmarks/plots.py on made-up results: every figure is drawn, failures are left out, readers get a title."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from ..scripts import load_script

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def plots() -> ModuleType:
    return load_script("benchmarks/plots.py")


def product(method: str, bits: int | str, batch: int, microseconds: float | None, n: int = 96) -> dict[str, Any]:
    return {
        "n": n, "k": 512, "bits": bits, "method": method, "batch": batch, "bytes": 1, "microseconds": microseconds,
        "floor_fraction": 0.5,
    }  # fmt: skip


def decoding(bits: str, mode: str, batch: int, speed: float) -> dict[str, Any]:
    row = {"model": "llama-3-8b", "bits": bits, "phase": "decode", "mode": mode, "batch": batch}
    return row | {"tokens_per_second": speed, "floor_fraction": 0.5}


def drawn(plots: ModuleType, folder: Path, rows: list[dict[str, Any]]) -> tuple[ElementTree.Element, list[str]]:
    """The picture of results of these rows, and its texts."""
    path = folder / "made-up.json"
    path.write_text(json.dumps({"gpu": "a <gpu>", "rows": rows}))
    target = plots.draw(path)
    assert target == folder / "made-up.svg"
    root = ElementTree.parse(target).getroot()
    return root, ["".join(node.itertext()) for node in root.iter(f"{SVG}text")]


def lines(root: ElementTree.Element) -> int:
    """Lines of data: each is clipped to its panel; the grid's are grey."""
    paths = [node for node in root.iter(f"{SVG}path") if "clip-path" in node.attrib]
    return sum("stroke: #e6e6e6" not in node.attrib["style"] for node in paths)


def test_products_have_a_panel_for_each_shape_and_a_line_for_each_method(plots: ModuleType, tmp_path: Path) -> None:
    ours = [product("circuitpress", bits, batch, 3.0 * batch, n) for bits in (4, "mixed") for batch in (1, 8)
            for n in (96, 64)]  # fmt: skip
    others = [product("gemlite int4", 4, batch, 5.0) for batch in (1, 8)]
    unplain = [product("circuitpress cache", 8, 1, 9.0, n=2048), product("circuitpress, norm and gates fused", 4, 1, 1)]
    failed = [{"n": 96, "k": 512, "bits": 4, "method": "marlin int4", "error": "no nvcc"}]
    root, texts = drawn(plots, tmp_path, ours + others + unplain + failed)
    assert [text for text in texts if " x 512" in text] == ["96 x 512", "64 x 512"]
    named = {"circuitpress, 4 bits", "circuitpress, mixed", "gemlite int4, 4 bits", "floor of 4 bits"}
    assert named <= set(texts)
    assert not any("cache" in text or "gates" in text or "marlin" in text for text in texts)
    assert lines(root) == 4 + 3  # the first panel has a peer and a floor, the second a floor


def test_decoding_has_a_panel_for_each_batch_and_a_bar_for_each_mode(plots: ModuleType, tmp_path: Path) -> None:
    rows = [
        decoding("4", "graph", 1, 500.0), decoding("4", "graph", 8, 3999.0), decoding("16", "graph", 1, 150.0),
        decoding("4", "compiled", 1, 420.0),
        {"model": "llama-3-8b", "bits": "2", "phase": "decode", "mode": "graph", "batch": 1, "error": "out of memory"},
        {"model": "llama-3-8b", "bits": "2", "phase": "prefill", "mode": "eager", "batch": 1, "tokens_per_second": 9e4},
    ]  # fmt: skip
    _, texts = drawn(plots, tmp_path, rows)
    assert [text for text in texts if text.startswith("batch")] == ["batch 1", "batch 8"]
    assert {"graph", "compiled", "500", "3999", "150", "420", "4", "16"} <= set(texts)
    assert "90000" not in texts


def test_a_picture_says_what_it_shows_and_is_the_same_every_time(plots: ModuleType, tmp_path: Path) -> None:
    rows = [product("circuitpress", 4, 1, 3.0)]
    root, _ = drawn(plots, tmp_path, rows)
    first = (tmp_path / "made-up.svg").read_bytes()
    assert root.attrib["role"] == "img"
    title = root.find(f"{SVG}title")
    assert title is not None
    assert title.attrib["id"] == root.attrib["aria-labelledby"]
    assert title.text == "Products with packed matrices on a <gpu>: microseconds over batch, for each shape"
    drawn(plots, tmp_path, rows)
    assert (tmp_path / "made-up.svg").read_bytes() == first


def test_results_without_a_figure_are_no_picture(plots: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no row of these results has a figure"):
        drawn(plots, tmp_path, [product("circuitpress", 4, 1, None)])
