"""What does each target cost? One checkpoint compressed for every target, exported, loaded by its own consumer.

Each target has a budget in bits per weight as the target stores them; where no plan fits, the smallest one that does
takes its place (matrices whose shape a target has no format for stay at 16 bits). `max_logit_error` is between the
exported folder, loaded in a fresh process without circuitpress, and the packed model; `kl` is the packed model's to
the original on the test text, in nats per token. For gguf, `kl` is that of the weights which the package gguf packs and
unpacks in the planned types (llama.cpp does better: it has the importance matrix), None where the package can only
unpack a type (Q2_K to Q6_K); `kl_planned` is that of the formats that stand in for them.

    python benchmarks/export.py MODEL --text train.txt --test test.txt
"""

import json
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import gguf
import torch
from safetensors.torch import load_file, save_file

from circuitpress.anatomy import read_anatomy
from circuitpress.console import Console
from circuitpress.errors import InfeasibleBudget
from circuitpress.evaluate import fidelity
from circuitpress.export.gguf import tensor_name
from circuitpress.menu import MENU, TARGET_MENUS
from circuitpress.recipe import Recipe
from circuitpress.run import run_recipe
from circuitpress.run.exporting import export_model
from circuitpress.run.folder import RunFolder
from circuitpress.run.session import Session
from circuitpress.stream import open_stream
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
        row |= {"file_bytes": plan.linear_bytes + plan.other_bytes, "kl_planned": kl}
        row["kl"] = _gguf_kl(Session(RunFolder(run), recipe, console), document["types"], out, scratch / "packed")
    return row


def _recipe(settings: dict[str, Any], target: str, budget: float) -> Recipe:
    wanted = settings | {"plan.target": target, "plan.budget": f"{budget:g}bpw"}
    if read_anatomy(Path(settings["model"])).dtype == "float32":
        menu = TARGET_MENUS.get(target, MENU)
        wanted["plan.formats"] = ["float16" if name == "dense" else name for name in menu]
    lines = [f"{key}={json.dumps(value)}" for key, value in wanted.items()]
    return Recipe.parse("{}", name="export", folder=Path(), overrides=lines)


def _gguf_kl(session: Session, types: dict[str, str], unrounded: Path, folder: Path) -> float | None:
    """KL of the weights that the package gguf makes of the planned types; None if it cannot pack one of them."""
    shutil.copytree(unrounded, folder)
    anatomy = read_anatomy(folder)
    names = {f"{m.module}.weight": tensor_name(b.index, m) for b in anatomy.blocks for m in b.matrices}
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors.keys() & names.keys():
            kind = gguf.GGMLQuantizationType[types[names[name]].upper()]
            try:
                packed = gguf.quants.quantize(tensors[name].float().numpy(), kind)
            except NotImplementedError:
                return None
            tensors[name] = torch.from_numpy(gguf.quants.dequantize(packed, kind).copy())
        save_file(tensors, file, metadata={"format": "pt"})
    return fidelity(open_stream(folder), session.original, session.windows[2].ids).to_json()["kl"]


if __name__ == "__main__":
    main()
