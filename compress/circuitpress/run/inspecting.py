"""What `inspect` does: every view asked for becomes one json and one figure in a folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..console import Console, table
from ..errors import RecipeError
from ..files import write_bytes_atomic
from ..units import UnitId
from .opening import open_model

Result = tuple[str, dict[str, Any]]


def inspect_model(
    model: str, console: Console, *, out: Path, what: Sequence[str], units: Sequence[str] = (),
    text: Path | None = None, windows: int = 32, length: int = 128, seed: int = 0, device: str | None = None,
) -> Result:  # fmt: skip
    """Writes `<view>.json` and `<view>.svg` into `out` for each view of `what` (empty: all)."""
    from ..mech.lens.figures import draw
    from ..mech.lens.inspect import VIEWS, Subject, View, look

    views: list[View] = [view for view in VIEWS if not what or view in what]
    unknown = [f"--what: there is no view {name!r}" for name in what if name not in VIEWS]
    parts, faults = _units(units)
    if unknown or faults:
        raise RecipeError(
            unknown + faults, hint=f"views are {', '.join(VIEWS)}; units look like L3.head.2, L3.neuron.17"
        )
    opened = open_model(model, device=device, spill=out / "spill")
    chosen = opened.windows(text, samples=windows, length=length, seed=seed)
    subject = Subject(opened.stream, chosen.ids, opened.decode, chosen.bos, opened.special, seed)
    document: dict[str, Any] = {"model": model, "text": chosen.describe(), "views": {}}
    for view in views:
        with console.progress(view) as advance:
            found = look(view, subject, units=parts, advance=advance) | {"text": chosen.describe()}
        write_bytes_atomic(out / f"{view}.json", (json.dumps(found) + "\n").encode())
        draw(found, out / f"{view}.svg")
        document["views"][view] = {
            "json": str(out / f"{view}.json"),
            "figure": str(out / f"{view}.svg"),
            "evidence": found["evidence"],
            "cannot_prove": found["cannot_prove"],
        }
    rows = [(view, row["figure"], row["evidence"]) for view, row in document["views"].items()]
    return table(f"{model}: {len(rows)} views on {len(chosen.ids)} windows", rows), document


def _units(texts: Sequence[str]) -> tuple[list[UnitId], list[str]]:
    units, faults = [], []
    for text in texts:
        try:
            units.append(UnitId.parse(text))
        except ValueError as error:
            faults.append(f"--unit: {error}")
    return units, faults
