"""What tables of a page are made of: rows of text, and numbers as people read them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of a table; `lead` begins it."""

    lead: str
    cells: tuple[str, ...]


def nats(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}" if value < 0.001 else f"{value:#.3g}".rstrip(".")


def size(nbytes: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:#.3g} {unit}".replace(". ", " ")
    return f"{nbytes:.0f} B"


def duration(seconds: float) -> str:
    """Seconds, or minutes, or hours."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
