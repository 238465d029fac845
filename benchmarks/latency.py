"""Does a budget in time give another plan than a budget in bytes, and does the model take the time that was planned?

1. Score a checkpoint in formats whose speed differs from their size; time those formats (`circuitpress bench kernels`).
2. For each time limit, a share of what the model takes in 16 bits: the plan within that time, and beside it the plan
   within as many bytes as that one takes.
3. Load both models in bfloat16 and measure how long their linear maps take, each in its turn as decoding calls them.

    python benchmarks/latency.py --checkpoint DIR [--text FILE] [--share 0.5 --share 0.7]
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from circuitpress.bench.timing import time_formats
from circuitpress.console import Console
from circuitpress.plan import LatencyTable
from circuitpress.recipe import Recipe
from circuitpress.run import apply_plan, replan, score_model
from circuitpress.units import Plan
from common import load_rows, save_results

FORMATS = ("int2g64", "int3g64", "int4g64", "int6g64", "int8g64", "bfloat16")
ROUNDS = 15
_PATH = click.Path(path_type=Path, exists=True)


@click.command()
@click.option("--checkpoint", type=_PATH, required=True)
@click.option("--text", type=_PATH)
@click.option("--share", "shares", type=float, multiple=True, default=(0.45, 0.6), show_default=True)
@click.option("--windows", default=16, show_default=True, help="of 128 tokens, to price on")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/latency.json"))
def main(checkpoint: Path, text: Path | None, shares: tuple[float, ...], windows: int, out: Path) -> None:
    """Measures and writes the rows."""
    console = Console(quiet=True, json=False, debug=False)
    rows = [row for row in load_rows(out) if row["checkpoint"] != checkpoint.name]
    with tempfile.TemporaryDirectory() as work:
        run, table = Path(work) / "run", Path(work) / "times.json"
        settings: dict[str, Any] = {
            "plan.formats": list(FORMATS), "plan.probes": [], "plan.swaps": 0, "score.exact": 0.0,
            "data.samples": windows, "data.length": 128, "evaluate.windows": 4, "run.device": "cpu",
        }  # fmt: skip
        settings |= {"data.calibration": str(text.resolve())} if text else {}
        recipe = Recipe(model=str(checkpoint.resolve())).replace(settings)
        score_model(recipe, run, console)
        time_formats(str(run), console, formats=None, batches="1", save=table, device="cpu")
        dense = _planned(run, console, "16bpw", table)
        for share in shares:
            limit = f"{share * dense['planned_us']:.1f}us@batch1"
            fast = _planned(run, console, limit, table)
            small = _planned(run, console, f"{fast['bits_per_weight']:.6f}bpw", table)
            for what, row in (("time", fast), ("bytes of that", small)):
                rows.append({"checkpoint": checkpoint.name, "share": share, "budget": what, **row})
                click.echo(json.dumps(rows[-1]))
        rows.append({"checkpoint": checkpoint.name, "share": 1.0, "budget": "none", **dense})
    save_results(out, rows)


def _planned(run: Path, console: Console, budget: str, table: Path) -> dict[str, Any]:
    """A plan, what it should take by the table, and what its model takes."""
    replan(run, console, budget=budget, target=None, protect=(), front=False, latencies=table)
    apply_plan(run, console)
    plan, times = Plan.load(run / "plan.json"), LatencyTable.load(table).times
    planned = sum(times[d.format, s.rows, s.cols, 1] for d in plan.decisions for s in d.group.segments)
    return {
        "planned_us": planned,
        "measured_us": _measured(run / "model"),
        "bits_per_weight": plan.bits_per_weight,
        "predicted_kl": plan.predicted_kl,
        "formats": {name: sum(d.format == name for d in plan.decisions) for name in FORMATS},
    }


@torch.no_grad()
def _measured(folder: Path) -> float:
    """Microseconds of all linear maps of the decoder blocks in one decoding step: the median over rounds."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    spent: list[float] = []
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear) or type(module).__name__ == "PackedLinear":
                _clock(module, spent)
    ids, found = torch.tensor([[5]]), []
    for _ in range(ROUNDS):
        spent.clear()
        model(ids)
        found.append(1e6 * sum(spent))
    return statistics.median(found)


def _clock(module: nn.Module, spent: list[float]) -> None:
    starts: list[float] = []
    module.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
    module.register_forward_hook(lambda *_: spent.append(time.perf_counter() - starts.pop()))


if __name__ == "__main__":
    main()
