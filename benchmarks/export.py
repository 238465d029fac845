"""What does each target cost? One checkpoint compressed for every target, exported, loaded by its own consumer.

Each target has a budget in bits per weight as the target stores them; where no plan fits, the smallest one that does
takes its place (matrices whose shape a target has no format for stay at 16 bits). `max_logit_error` is between the
exported folder, loaded in a fresh process without circuitpress, and the packed model; `kl` is the packed model's to
the original on the test text, in nats per token. For gguf it is None: llama.cpp rounds the weights, and llama_cpp.py
measures that; `kl_planned` is that of the formats that stand in for its types.

    python benchmarks/export.py MODEL --text train.txt --test test.txt
"""

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from circuitpress.anatomy import read_anatomy
from circuitpress.console import Console
from circuitpress.errors import InfeasibleBudget
from circuitpress.menu import MENU, TARGET_MENUS
from circuitpress.recipe import Recipe
from circuitpress.run import run_recipe
from circuitpress.run.exporting import export_model
from circuitpress.units import Plan
from common import load_rows, save_results

BUDGETS = {"compressed-tensors": 4.3, "bitsandbytes": 4.6, "dense": 3.0, "gguf": 4.6}


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path), help="text to calibrate on")
@click.option("--test", type=click.Path(path_type=Path), help="text to measure on")
@click.option("--target", "targets", multiple=True, type=click.Choice(list(BUDGETS)), help="default: all")
@click.option("--samples", default=64, show_default=True)
@click.option("--windows", default=32, show_default=True)
@click.option("--length", default=256, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/export.json"))
def main(
    model: Path, text: Path | None, test: Path | None, targets: tuple[str, ...], samples: int, windows: int,
    length: int, out: Path,
) -> None:  # fmt: skip
    """Compresses MODEL for every target, exports and loads it; rows of other checkpoints in --out stay."""
    settings = {
        "model": str(model), "data.samples": samples, "data.length": length, "evaluate.windows": windows,
        "score.exact": 0, "run.device": "cpu", "plan.probes": [],
    } | ({"data.calibration": str(text)} if text else {}) | ({"data.test": str(test)} if test else {})  # fmt: skip
    rows = [row for row in load_rows(out) if row["checkpoint"] != model.name]
    for target in targets or BUDGETS:
        with tempfile.TemporaryDirectory() as scratch:
            row = {"checkpoint": model.name, "target": target} | _measure(target, settings, Path(scratch))
        rows.append(row)
        click.echo(json.dumps(row))
        save_results(out, rows)


def _measure(target: str, settings: dict[str, Any], scratch: Path) -> dict[str, Any]:
    console, run, out = Console(quiet=True), scratch / "run", scratch / "out"
    budget = BUDGETS[target]
    try:
        recipe = _recipe(settings, target, budget)
        run_recipe(recipe, run, console)
    except InfeasibleBudget as error:
        budget = math.ceil(error.smallest_bits * 100) / 100
        recipe = _recipe(settings, target, budget)
        run_recipe(recipe, run, console, restart=True)
    started = time.monotonic()
    _, document = export_model(run / "model", target, out, console)
    seconds = time.monotonic() - started
    plan = Plan.load(run / "plan.json")
    kl = json.loads((run / "evaluate" / "fidelity.json").read_text())["kl"]
    row = {
        "budget": budget,
        "bits_per_weight": plan.bits_per_weight,
        "file_bytes": document["bytes"],
        "max_logit_error": document["check"]["max_logit_error"],
        "largest_logit": document["check"]["largest_logit"],
        "kl": kl,
        "seconds": seconds,
        "consumer": {name: v for name, v in document["versions"].items() if name not in ("circuitpress", "torch")},
    }
    if target == "gguf":
        row |= {"file_bytes": plan.linear_bytes + plan.other_bytes, "kl": None, "kl_planned": kl}
    return row


def _recipe(settings: dict[str, Any], target: str, budget: float) -> Recipe:
    wanted = settings | {"plan.target": target, "plan.budget": f"{budget:g}bpw"}
    if read_anatomy(Path(settings["model"])).dtype == "float32":
        menu = TARGET_MENUS.get(target, MENU)
        wanted["plan.formats"] = ["float16" if name == "dense" else name for name in menu]
    lines = [f"{key}={json.dumps(value)}" for key, value in wanted.items()]
    return Recipe.parse("{}", name="export", folder=Path(), overrides=lines)


if __name__ == "__main__":
    main()
