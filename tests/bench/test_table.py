"""Cells and budgets of a comparison, against values worked out by hand; the plot is written."""

from pathlib import Path

import pytest

from circuitpress.bench import budgets_of, cells, draw, render


def row(method: str, bits: float, kl: float, text: str = "a", error: str | None = None) -> dict[str, object]:
    """One row of quality.json; 1000 linear weights."""
    shown = None if error else bits
    return {
        "checkpoint": "model", "text": text, "method": method, "budget": f"{bits:g}", "bits_per_weight": shown,
        "kl": None if error else kl, "kl_stderr": 0.01, "perplexity": 5.0, "top1_agreement": 0.5,
        "linear_bytes": None if error else int(125 * bits), "file_bytes": None if error else 5000, "seconds": 1.0,
        "error": error,
    }  # fmt: skip


ROWS = [
    row("autoround", 3.3, 0.2),
    row("gptqmodel", 3.6, 0.1),
    row("hqq", 3.5, 0.5),
    row("autoround", 2.3, 1.0),
    row("circuitpress", 3.28, 0.08),
    row("circuitpress", 3.6, 0.06),
    row("circuitpress", 3.61, 0.01),
    row("control:uniform", 3.3, 0.01),
    row("exllamav3", 0.0, 0.0, error="CUDA only"),
]


def test_cells_compare_at_no_more_bytes() -> None:
    low, middle, high = cells(ROWS)
    assert (low.best, low.ratio, low.worst) == ("autoround 2.3", None, None)  # nothing of ours is that small
    assert (middle.best, middle.best_kl, middle.ours_kl) == ("gptqmodel 3.6", 0.1, 0.06)
    assert middle.ratio == pytest.approx(0.6)
    assert middle.worst == pytest.approx(0.6)  # 0.4 against AutoRound, 0.16 against HQQ
    assert high.best is None


def test_our_row_may_have_the_very_bytes_of_the_peer_but_not_one_more() -> None:
    (cell,) = [c for c in cells([row("hqq", 3.0, 0.4), row("circuitpress", 3.0, 0.1)]) if c.best]
    assert cell.ratio == pytest.approx(0.25)
    (cell,) = [c for c in cells([row("hqq", 3.0, 0.4), row("circuitpress", 3.01, 0.1)]) if c.best]
    assert cell.ratio is None


def test_budgets_are_those_of_the_best_and_of_autoround() -> None:
    assert budgets_of(ROWS) == [2.3, 3.3, 3.6]
    assert budgets_of([*ROWS, row("autoround", 3.302, 0.15)]) == [2.3, 3.3, 3.6]


def test_tables_name_what_failed() -> None:
    text = render(ROWS)
    assert "exllamav3 0: CUDA only" in text
    assert "gptqmodel 3.6 (3.60)" in text


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_plot_is_written(ending: str, tmp_path: Path) -> None:
    rows = [*ROWS, *(row("hqq", bits, 1 / bits, text=text) for bits in (2.5, 4.5) for text in "bc")]
    draw(rows, tmp_path / f"plot.{ending}")
    assert (tmp_path / f"plot.{ending}").stat().st_size > 5000
