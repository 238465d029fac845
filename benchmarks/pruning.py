"""Pruning against other ways to choose, and pruning, bits and both at equal bytes.

selection: 10, 25 and 50 % of the neurons, of the key-value groups and of both leave every layer. Only the choice of
units differs; the compensation is ours for all, and shapes and bytes are equal.

- `circuitpress`: greedy removal in nats (prune/select.py);
- `control:wanda`: sum over a unit's columns of |W| times the norm of its input, the structured form of Wanda
  (arXiv 2306.11695): weights of `down` for a neuron, of `o` for a group;
- `control:magnitude`: squared norm of all weights that a unit owns;
- `control:random`: any units;
- `circuitpress, not compensated`: our choice with the weights that stay left alone.

joint: one budget, spent by `bits alone`, by `pruning alone` (floating-point weights) and by the search over both.

    python benchmarks/pruning.py --checkpoint DIR --text FILE [--checkpoint ...] --out benchmarks/results

Calibrated on one part of a text, chosen on a second, measured on a third. Rows of other checkpoints are kept.
"""

import io
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoTokenizer

from circuitpress.anatomy import read_anatomy
from circuitpress.console import Console
from circuitpress.data import load_windows
from circuitpress.errors import InfeasibleBudget
from circuitpress.evaluate import fidelity
from circuitpress.hooks import capture, weight_of
from circuitpress.prune import price_drops, prune
from circuitpress.recipe import Recipe
from circuitpress.run import run_recipe
from circuitpress.stream import Stream, forward, open_stream
from circuitpress.widths import Widths, full_widths, kept, narrow
from common import load_rows, readable_text, save_results

FRACTIONS = (0.1, 0.25, 0.5)
BUDGETS = ("2.0bpw", "2.4bpw", "3.0bpw", "8.0bpw")
FORMATS = ["int2g32", "int2", "int3g32", "int3", "int4", "int6", "int8", "bfloat16"]
Row = dict[str, Any]
Units = dict[str, list[NDArray[np.int64]]]
"""By kind, for every layer, unit indices in the order in which they leave."""


@click.command()
@click.option("--checkpoint", "checkpoints", type=click.Path(path_type=Path, exists=True), multiple=True, required=True)
@click.option("--text", "texts", type=click.Path(path_type=Path, exists=True), multiple=True, required=True)
@click.option("--windows", default=64, show_default=True, help="calibration windows of 256 tokens")
@click.option("--parts", default="selection,joint", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True)
def main(checkpoints: tuple[Path, ...], texts: tuple[Path, ...], windows: int, parts: str, out: Path) -> None:
    """Measures selections and budgets."""
    measures: dict[str, Callable[..., Any]] = {"selection": _selection, "joint": _joint}
    path = out / "pruning.json"
    for checkpoint, text in zip(checkpoints, texts, strict=True):
        for part in parts.split(","):
            rows = [r for r in load_rows(path) if (r["checkpoint"], r["part"]) != (checkpoint.name, part)]
            with tempfile.TemporaryDirectory() as folder:
                for row in measures[part](checkpoint, text, windows, Path(folder)):
                    rows.append({"checkpoint": checkpoint.name, "part": part, "text": text.name} | row)
                    click.echo(json.dumps(rows[-1]))
                    save_results(path, rows)


def _selection(checkpoint: Path, text: Path, windows: int, folder: Path) -> Any:
    stream = open_stream(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    drawn = load_windows(readable_text(text, tokenizer, folder), tokenizer, length=256, samples=windows + 48, seed=0)
    calibration, test = drawn.ids[:windows], drawn.ids[windows:]
    full = full_widths(stream.anatomy)
    ladders = [
        [kept(total, fraction) for fraction in (0, *FRACTIONS)] for total in (full.neurons, full.kv_groups)
    ]  # fmt: skip
    drops = price_drops(stream, calibration, neurons=ladders[0], kv_groups=ladders[1], folder=folder / "drops")
    orders: dict[str, Units] = {"circuitpress": {kind: list(order) for kind, order in drops.order.items()}}
    orders |= {f"control:{name}": units for name, units in _controls(stream, calibration).items()}
    done: set[tuple[str, Widths]] = set()
    for fraction in FRACTIONS:
        n, g = kept(full.neurons, fraction), kept(full.kv_groups, fraction)
        pairs = {
            "neurons": Widths(n, full.kv_groups),
            "KV groups": Widths(full.neurons, g),
            "both": Widths(n, g),
        }
        for what, widths in pairs.items():
            for method in [*orders, "circuitpress, not compensated"]:
                if (method, widths) in done or widths == full:
                    continue
                done.add((method, widths))
                fit = method in orders
                order = orders[method if fit else "circuitpress"]
                yield _pruned(stream, calibration, test, order, widths, fit, folder / "model") | {
                    "method": method,
                    "what": what,
                    "fraction": fraction,
                    "price": drops.price(widths) if method == "circuitpress" else None,
                }


def _pruned(
    stream: Stream, calibration: Tensor, test: Tensor, order: Units, widths: Widths, fit: bool, out: Path
) -> Row:
    full = full_widths(stream.anatomy)
    totals = {"neuron": (full.neurons, widths.neurons), "kv_group": (full.kv_groups, widths.kv_groups)}
    stay = {
        layer: {
            kind: np.setdiff1d(np.arange(n), order[kind][layer][: n - width]) for kind, (n, width) in totals.items()
        }
        for layer in range(stream.depth)
    }
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as shards:
        prune(stream, calibration, stay, shards=Path(shards), out=out, fit=fit)
    seconds = time.monotonic() - start
    result = fidelity(open_stream(out), stream, test)
    return {
        "neurons": widths.neurons,
        "kv_groups": widths.kv_groups,
        "weights_left": open_stream(out).anatomy.present_numel / stream.anatomy.linear_numel,
        "linear_bytes": result.linear_bytes,
        "kl": result.divergence.kl,
        "kl_stderr": result.divergence.kl_stderr,
        "perplexity": result.divergence.perplexity,
        "top1_agreement": result.divergence.top1_agreement,
        "seconds": seconds,
    }


def _controls(stream: Stream, calibration: Tensor) -> dict[str, Units]:
    """The orders of scores that are computed once, cheapest unit first."""
    result: dict[str, Units] = {name: {"neuron": [], "kv_group": []} for name in ("wanda", "magnitude", "random")}
    batches, draw = stream.batches(calibration), np.random.default_rng(0)

    def visit(index: int, module: nn.Module, inputs: Callable[[int], Tensor]) -> None:
        place = stream.anatomy.blocks[index]
        weights = {m.role: weight_of(module, place, m).float() for m in place.matrices}
        names = {role: place.local(place.role(role)) for role in ("o", "down")}
        norms = {role: torch.zeros(weights[role].shape[1]) for role in names}
        for b in range(len(batches)):
            with capture(module, list(names.values())) as seen:
                stream.run(index, module, inputs(b))
            for role, name in names.items():
                x = seen[name].input
                assert x is not None
                norms[role] += x.flatten(0, -2).float().square().sum(0)
        scores: Mapping[str, Mapping[str, Tensor]] = {
            "wanda": {
                "neuron": weights["down"].abs().sum(0) * norms["down"].sqrt(),
                "kv_group": _by_group(weights["o"].abs().sum(0) * norms["o"].sqrt(), place.kv_heads),
            },
            "magnitude": {
                "neuron": weights["down"].square().sum(0)
                + weights["gate"].square().sum(1)
                + weights["up"].square().sum(1),
                "kv_group": _by_group(weights["o"].square().sum(0), place.kv_heads)
                + sum(_by_group(weights[role].square().sum(1), place.kv_heads) for role in "qkv"),
            },
            "random": {
                "neuron": torch.from_numpy(draw.random(place.neurons)),
                "kv_group": torch.from_numpy(draw.random(place.kv_heads)),
            },
        }
        for name, kinds in scores.items():
            for kind, score in kinds.items():
                result[name][kind].append(score.argsort(stable=True).numpy())

    store = stream.store("controls")
    forward(stream, batches, store, visit=visit)
    store.clear()
    return result


def _by_group(values: Tensor, groups: int) -> Tensor:
    return values.view(groups, -1).sum(1)


def _joint(checkpoint: Path, text: Path, windows: int, folder: Path) -> Any:
    text = readable_text(text, AutoTokenizer.from_pretrained(checkpoint), folder)
    anatomy = read_anatomy(checkpoint)
    full = full_widths(anatomy)
    for budget in BUDGETS:
        yield {"method": "bits alone", "budget": budget} | _run(
            checkpoint, text, windows, folder / f"bits {budget}", {"plan.budget": budget, "plan.formats": FORMATS}
        )
        asked: dict[str, Any] = {"plan.budget": budget, "plan.formats": ["drop", *FORMATS]}
        joint = _run(checkpoint, text, windows, folder / f"joint {budget}", asked)
        yield {"method": "joint", "budget": budget} | joint
        if joint["kl"] is None:
            continue
        # The search has found out which pair of widths drops alone would take.
        cap = float(budget.removesuffix("bpw")) * anatomy.linear_numel / 16
        fits = [
            (entry["drop_kl"], Widths(entry["neurons"], entry["kv_groups"]))
            for entry in joint["candidates"]
            if narrow(anatomy, Widths(entry["neurons"], entry["kv_groups"])).present_numel <= cap
        ]
        if fits:
            widths = min(fits)[1]
            asked = {
                "plan.budget": "16bpw",
                "plan.formats": ["bfloat16"],
                "prune.neurons": 1 - widths.neurons / full.neurons,
                "prune.kv_groups": 1 - widths.kv_groups / full.kv_groups,
            }
            alone = _run(checkpoint, text, windows, folder / f"drops {budget}", asked)
            yield {"method": "pruning alone", "budget": budget} | alone


def _run(checkpoint: Path, text: Path, windows: int, out: Path, asked: Mapping[str, Any]) -> Row:
    settings = {
        "data.calibration": str(text),
        "data.samples": windows,
        "data.length": 256,
        "evaluate.windows": 48,
        "score.exact": 0,
        "plan.probes": [],
        "plan.swaps": 0,
    } | dict(asked)
    lines = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    recipe = Recipe.parse(f"model: {checkpoint}", name="benchmark", folder=Path("/"), overrides=lines)
    try:
        _, document = run_recipe(recipe, out, Console(err=io.StringIO(), out=io.StringIO()))
    except InfeasibleBudget as error:
        return {"kl": None, "smallest_bits": error.smallest_bits}
    pruned = json.loads((out / "prune.json").read_text())
    return {
        "bits_per_weight": document["bits_per_weight"],
        "kl": document["kl"],
        "kl_stderr": document["kl_stderr"],
        "widths": pruned["widths"],
        "candidates": pruned["candidates"],
        "seconds": document["seconds"],
    }


if __name__ == "__main__":
    main()
