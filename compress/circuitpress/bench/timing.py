"""`bench kernels`: the table of times for a model's shapes, measured, shown and saved."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..anatomy import read_anatomy
from ..checkpoint import resolve_checkpoint
from ..console import Console, table
from ..run.session import choose_device
from ..units import Prices


def time_formats(
    model: str, console: Console, *, formats: str | None, batches: str, save: Path | None, device: str | None,
    tune: bool = False,
) -> tuple[str, dict[str, Any]]:  # fmt: skip
    """Text and document of the command; `model` is a checkpoint, or a run folder, whose formats are then timed.

    With `tune` the launches of the GPU kernels are chosen and saved before.
    """
    import torch

    from .latency import describe, measure, save_table, shapes_of

    anatomy, names = _what(model, formats)
    chosen = choose_device(device or "auto")
    sizes = [int(part) for part in batches.split(",")]
    shapes = shapes_of(anatomy)
    tuned = _tune(shapes, names, chosen, console) if tune else None
    with console.progress("kernels", len(shapes) * len(names)) as advance:
        rows = measure(shapes, names, sizes, device=chosen, advance=advance)
    machine = describe(chosen)
    if save is not None:
        save_table(rows, save, device=chosen, dtype=torch.bfloat16)
    lines = [("format", "shape", *(f"batch {size}, us" for size in sizes))]
    for name in names:
        for height, width in shapes:
            found = [r for r in rows if (r["format"], r["rows"], r["cols"]) == (name, height, width)]
            if found:
                lines.append((name, f"{height} x {width}", *(f"{row['microseconds']:.1f}" for row in found)))
    text = table(f"one linear map on {machine}, bfloat16", lines)
    if save is not None:
        text += f"\n\n{save}\nnext: circuitpress plan DIR --budget 12ms@batch{sizes[0]} --latencies {save}"
    if tuned is not None:
        text = f"launches: {tuned}\n\n{text}"
    tuned_at = {} if tuned is None else {"launches": str(tuned)}
    return text, {"machine": machine, "rows": rows, "saved": None if save is None else str(save)} | tuned_at


def _tune(shapes: Sequence[tuple[int, int]], names: Sequence[str], device: str, console: Console) -> Path:
    from .latency import describe
    from .launches import on_gpu, save, tune

    timer, kinds_of = on_gpu(device)
    with console.progress("launches", len(shapes) * len(names)) as advance:
        found = tune(shapes, names, device=describe(device), timer=timer, kinds_of=kinds_of, advance=advance)
    return save(found)


def _what(model: str, formats: str | None) -> tuple[Any, Sequence[str]]:
    folder = Path(model)
    if (folder / "prices.json").is_file():
        priced = Prices.load(folder / "prices.safetensors").formats
        source = json.loads((folder / "anatomy.json").read_text())["folder"]
        anatomy = read_anatomy(Path(source))
        return anatomy, formats.split(",") if formats else priced
    default = ("int2g64", "int3g64", "int4g64", "int5g64", "int6g64", "int8g64", "bfloat16")
    return read_anatomy(resolve_checkpoint(model)), formats.split(",") if formats else default
