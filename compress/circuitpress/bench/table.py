"""Rows of a comparison, what they come to per cell, and how they print.

A cell is one checkpoint, one text and one band of real bits. In it stands one number: our KL at equal or fewer linear
bytes over the best peer's. Peers are compared by what they store, never by their nominal width.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..console import table

Row = Mapping[str, Any]

OURS = "circuitpress"
BANDS = ((2.0, 2.7), (3.0, 3.7), (4.0, 4.7))
"""Real bits per weight, both ends included: nominal 2, 3 and 4 bits with the scales that tools keep beside them."""


@dataclass(frozen=True)
class Cell:
    """One band of one checkpoint and text. `ratio` is our KL over the best peer's at no more bytes than it takes.

    `worst` is the largest such ratio over all peers of the band that we have a row at no more bytes for. Both are None
    where there is nothing to compare.
    """

    checkpoint: str
    text: str
    band: tuple[float, float]
    best: str | None
    best_bits: float | None
    best_kl: float | None
    ours_bits: float | None
    ours_kl: float | None
    ratio: float | None
    worst: float | None


def is_peer(row: Row) -> bool:
    """Whether a row is somebody else's and has a figure."""
    return row["error"] is None and row["method"] != OURS and not row["method"].startswith("control:")


def cells(rows: Sequence[Row]) -> list[Cell]:
    """The cells of all checkpoints and texts in `rows`, in their order."""
    keys = dict.fromkeys((row["checkpoint"], row["text"]) for row in rows)
    return [_cell(rows, checkpoint, text, band) for checkpoint, text in keys for band in BANDS]


def in_band(rows: Iterable[Row], band: tuple[float, float]) -> list[Row]:
    """The rows whose real bits lie in `band`."""
    return [row for row in rows if row["bits_per_weight"] is not None and band[0] <= row["bits_per_weight"] <= band[1]]


def budgets_of(rows: Sequence[Row]) -> list[float]:
    """The real bits that our side is asked for by default: the best peer of every band, and every row of AutoRound.

    `rows` are those of one checkpoint and text. Budgets closer than 0.005 bits are one.
    """
    peers = [row for row in rows if is_peer(row)]
    wanted = {row["bits_per_weight"] for band in BANDS for row in in_band(peers, band) if row["method"] == "autoround"}
    wanted |= {min(found, key=lambda row: row["kl"])["bits_per_weight"] for b in BANDS if (found := in_band(peers, b))}
    kept: list[float] = []
    for bits in sorted(wanted):
        if not kept or bits - kept[-1] > 0.005:
            kept.append(bits)
    return kept


def render(rows: Sequence[Row]) -> str:
    """The tables for a terminal: all rows by bits, then the cells."""
    parts = []
    for checkpoint, text in dict.fromkeys((row["checkpoint"], row["text"]) for row in rows):
        mine = [row for row in rows if (row["checkpoint"], row["text"]) == (checkpoint, text)]
        measured = sorted((row for row in mine if row["error"] is None), key=lambda row: row["bits_per_weight"])
        lines = [("method", "budget", "bits", "KL", "+-", "perplexity", "top-1", "file", "seconds")]
        lines += [_line(row) for row in measured]
        parts.append(table(f"{checkpoint} on {text}", lines))
    failed = dict.fromkeys((row["method"], row["budget"], row["error"]) for row in rows if row["error"] is not None)
    parts += [f"{method} {budget}: {error}" for method, budget, error in failed]
    head = [("checkpoint", "text", "bits", "best peer", "its KL", "our KL", "ratio", "worst ratio")]
    body = [_cell_line(cell) for cell in cells(rows) if cell.best is not None]
    return "\n\n".join([*parts, table("our KL over the best peer's, at no more bytes", [*head, *body])])


def _cell(rows: Sequence[Row], checkpoint: str, text: str, band: tuple[float, float]) -> Cell:
    mine = [row for row in rows if (row["checkpoint"], row["text"]) == (checkpoint, text) and row["error"] is None]
    peers = in_band([row for row in mine if is_peer(row)], band)
    own = [row for row in mine if row["method"] == OURS]
    if not peers:
        return Cell(checkpoint, text, band, None, None, None, None, None, None, None)
    best = min(peers, key=lambda row: row["kl"])
    against = _within(own, best)
    ratios = [found["kl"] / peer["kl"] for peer in peers if (found := _within(own, peer)) is not None]
    return Cell(
        checkpoint=checkpoint,
        text=text,
        band=band,
        best=f"{best['method']} {best['budget']}",
        best_bits=best["bits_per_weight"],
        best_kl=best["kl"],
        ours_bits=against["bits_per_weight"] if against else None,
        ours_kl=against["kl"] if against else None,
        ratio=against["kl"] / best["kl"] if against else None,
        worst=max(ratios, default=None),
    )


def _within(own: Sequence[Row], peer: Row) -> Row | None:
    """Our best row that takes no more bytes than a peer's."""
    fitting = [row for row in own if row["linear_bytes"] <= peer["linear_bytes"]]
    return min(fitting, key=lambda row: row["kl"], default=None)


def _line(row: Row) -> tuple[str, ...]:
    kl, spread = f"{row['kl']:.4g}", f"{row['kl_stderr']:.1g}"
    top1, size = f"{100 * row['top1_agreement']:.1f} %", f"{row['file_bytes'] / 1e6:.2f} MB"
    seconds = f"{row['seconds']:.1f}" if row["seconds"] else ""
    bits = f"{row['bits_per_weight']:.3f}"
    return (row["method"], row["budget"], bits, kl, spread, f"{row['perplexity']:.4g}", top1, size, seconds)


def _cell_line(cell: Cell) -> tuple[str, ...]:
    low, high = cell.band
    figures = (cell.best_kl, cell.ours_kl, cell.ratio, cell.worst)
    shown = tuple("" if value is None else f"{value:.3g}" for value in figures)
    return (cell.checkpoint, cell.text, f"{low:g} to {high:g}", f"{cell.best} ({cell.best_bits:.2f})", *shown)
