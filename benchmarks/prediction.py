"""How well KL is predicted before a plan is built: the sum of prices, and that sum corrected by measured probes.

For each checkpoint, in one walk with all plans as variants:

1. price the default menu on calibration windows and plan for BUDGETS; the predictions are frozen here;
2. measure the default probes (five other plans) on held-out windows of the calibration text: their curve corrects the
   predictions. Beside it the curve through uniform 2-, 3- and 4-bit models, which it replaced;
3. measure the plans on windows of the test text (other documents where the checkpoint has a test text of its own).

    python benchmarks/prediction.py --checkpoint DIR --calibration FILE --test FILE [--out benchmarks/results]

The test file may be the calibration file: windows are disjoint. Rows of other checkpoints in the file are kept.
`--work` keeps the price shards, so that a stopped run goes on.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from circuitpress.data import load_windows
from circuitpress.errors import InfeasibleBudget
from circuitpress.formats import resolve
from circuitpress.menu import MENU, PROBES
from circuitpress.plan import Curve, make_plan
from circuitpress.price import price
from circuitpress.probe import plan_edits, uniform_plan
from circuitpress.score.variants import measure_windows
from circuitpress.stream import open_stream
from circuitpress.units import Decision, Plan, Prices, Probe
from common import load_rows, readable_text, save_results

BUDGETS = (
    "2.15bpw",
    "2.4bpw",
    "2.5bpw",
    "2.75bpw",
    "2.9bpw",
    "3.1bpw",
    "3.25bpw",
    "3.75bpw",
    "4.0bpw",
    "4.25bpw",
    "5.0bpw",
)
UNIFORM = ("int2g64", "int3g64", "int4g64")
Row = dict[str, Any]


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--calibration", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--test", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--windows", default=64, show_default=True, help="calibration windows of 256 tokens")
@click.option("--measured", default=48, show_default=True, help="held-out windows, and as many test windows")
@click.option("--seed", default=0, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="folder that keeps the price shards")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True)
def main(
    checkpoint: Path,
    calibration: Path,
    test: Path,
    windows: int,
    measured: int,
    seed: int,
    work: Path | None,
    out: Path,
) -> None:
    """Predicts and measures plans of one checkpoint."""
    rows = [row for row in load_rows(out / "prediction.json") if row["checkpoint"] != checkpoint.name]
    with TemporaryDirectory() as folder:
        new = _predict(checkpoint, calibration, test, windows, measured, seed, work or Path(folder))
    save_results(out / "prediction.json", rows + new)
    _show(new)
    _summarize(rows + new)


def _predict(
    checkpoint: Path, calibration: Path, test: Path, windows: int, measured: int, seed: int, work: Path
) -> list[Row]:
    work.mkdir(parents=True, exist_ok=True)
    stream = open_stream(checkpoint)
    calibrated, held_out, tested = _texts(checkpoint, calibration, test, windows, measured, seed, work)
    dtype = getattr(torch, stream.anatomy.dtype)
    menu = list(dict.fromkeys(resolve(name, group_size=64, dtype=dtype) for name in MENU))
    prices = price(stream, calibrated, formats=menu, seed=seed, folder=work)[1]
    plans = {budget: plan for budget in BUDGETS if (plan := _plan(prices, budget)) is not None}
    probes = {f"probe {size}": plan.decisions for size in PROBES if (plan := _plan(prices, size)) is not None}
    uniform = {f"uniform {form}": uniform_plan(prices, form) for form in UNIFORM}
    everything = {budget: plan.decisions for budget, plan in plans.items()} | probes | uniform
    edits = plan_edits(stream, everything, calibration=calibrated, saliency=work, orders=prices.neuron_order)
    found = measure_windows(stream, torch.cat([held_out, tested]), edits, context=calibrated)
    kl = {label: (per[: len(held_out)].mean(), per[len(held_out) :]) for label, per in found.items()}
    by_probes, by_uniform = (
        Curve.fit([_probe(label, decisions, float(kl[label][0])) for label, decisions in measured.items()])
        for measured in (probes, uniform)
    )
    return [
        {
            "checkpoint": checkpoint.name,
            "plan": budget,
            "bits_per_weight": plan.bits_per_weight,
            "predicted_kl": plan.predicted_kl,
            "predicted_kl_corrected": by_probes(plan.predicted_kl),
            "predicted_kl_uniform": by_uniform(plan.predicted_kl),
            "kl": float(kl[budget][1].mean()),
            "kl_stderr": float(kl[budget][1].std(ddof=1) / np.sqrt(len(tested))),
            "kl_held_out": float(kl[budget][0]),
        }
        for budget, plan in plans.items()
    ]


def _texts(
    checkpoint: Path, calibration: Path, test: Path, windows: int, measured: int, seed: int, work: Path
) -> Sequence[Tensor]:
    """Calibration, held-out and test windows."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    same = calibration == test
    count = windows + measured * (2 if same else 1)
    text = readable_text(calibration, tokenizer, work)
    drawn = load_windows(text, tokenizer, length=256, samples=count, seed=seed).ids
    if same:
        return drawn.split([windows, measured, measured])
    other = load_windows(readable_text(test, tokenizer, work), tokenizer, length=256, samples=measured, seed=seed).ids
    return *drawn.split([windows, measured]), other


def _plan(prices: Prices, budget: str) -> Plan | None:
    try:
        return make_plan(prices, budget=budget, other_bytes=0)
    except InfeasibleBudget:
        return None


def _probe(label: str, decisions: Sequence[Decision], kl: float) -> Probe:
    return Probe(label, 0.0, sum(decision.nats for decision in decisions), kl)


def _show(rows: Sequence[Row]) -> None:
    for row in rows:
        ratios = (
            row[name] / row["kl"] - 1 for name in ("predicted_kl", "predicted_kl_uniform", "predicted_kl_corrected")
        )
        errors = ", ".join(
            f"{label} {ratio:+.1%}" for label, ratio in zip(("sum", "uniform", "probes"), ratios, strict=True)
        )
        click.echo(f"{row['checkpoint']} {row['plan']} ({row['bits_per_weight']:.3f}): KL {row['kl']:.5f}; {errors}")


def _summarize(rows: Sequence[Row]) -> None:
    for name in ("predicted_kl", "predicted_kl_uniform", "predicted_kl_corrected"):
        errors = {
            label: [
                abs(row[name] / row["kl"] - 1) for row in rows if (row["bits_per_weight"] >= 3) == high and name in row
            ]
            for label, high in (("3 bits and above", True), ("below", False))
        }
        medians = ", ".join(
            f"{label} {np.median(values):.1%} of {len(values)}" for label, values in errors.items() if values
        )
        click.echo(f"median relative error of {name}: {medians}")


if __name__ == "__main__":
    main()
