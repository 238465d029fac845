"""Plans against controls at equal bytes, predictions against measurements, prices against interventions.

For each checkpoint and seed, everything is calibrated on one part of a text and measured on another:

- quality.json: our plan at the bytes of the uniform 2-, 3- and 4-bit models, beside uniform GPTQ (our own, with the
  same Hessians) and uniform round-to-nearest (min-max grids), all in groups of 64;
- prediction.json: plans at 4.0, 3.0 and 2.5 bits per weight: the additive prediction, the corrected one (curve
  through the uniform probes on held-out calibration text) and the KL on the test text;
- exact.json: every matrix at 2, 3 and 4 bits changed alone (first seed): price and measured KL.

    python benchmarks/quality.py --checkpoint DIR --text FILE [--checkpoint ...] --out benchmarks/results

Rows of other checkpoints in the results files are kept.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from circuitpress.data import load_windows
from circuitpress.formats import IntFormat, parse, resolve
from circuitpress.hooks import replace, weight_of
from circuitpress.plan import Curve, make_plan
from circuitpress.price import price
from circuitpress.probe import choose_singles, exact, probe, uniform_plan
from circuitpress.recipe import MENU
from circuitpress.rounding import block_hessians, decoded_in_place, round_block, segments_by_module
from circuitpress.score.variants import Edit, measure
from circuitpress.stream import Stream, open_stream
from circuitpress.units import Decision, Plan, Prices
from common import load_rows, readable_text, save_results

UNIFORM = ("int2g64", "int3g64", "int4g64")
BUDGETS = ("4.0bpw", "3.0bpw", "2.5bpw")
Row = dict[str, Any]


@click.command()
@click.option("--checkpoint", "checkpoints", type=click.Path(path_type=Path, exists=True), multiple=True, required=True)
@click.option("--text", "texts", type=click.Path(path_type=Path, exists=True), multiple=True, required=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--windows", default=96, show_default=True, help="calibration windows of 256 tokens")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True)
def main(checkpoints: tuple[Path, ...], texts: tuple[Path, ...], seeds: int, windows: int, out: Path) -> None:
    """Measures plans, controls, predictions and prices."""
    names = {checkpoint.name for checkpoint in checkpoints}
    quality, prediction, singles = (
        [row for row in load_rows(out / f"{name}.json") if row["checkpoint"] not in names]
        for name in ("quality", "prediction", "exact")
    )
    for checkpoint, text in zip(checkpoints, texts, strict=True):
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                found = _one_seed(checkpoint, text, seed, windows, Path(folder))
            for rows, new, name in zip(
                (quality, prediction, singles), found, ("quality", "prediction", "exact"), strict=True
            ):
                rows += new
                save_results(out / f"{name}.json", rows)
            _show(checkpoint.name, seed, *found)


def _one_seed(
    checkpoint: Path, text: Path, seed: int, windows: int, folder: Path
) -> tuple[list[Row], list[Row], list[Row]]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    stream = open_stream(checkpoint)
    text = readable_text(text, tokenizer, folder)
    drawn = load_windows(text, tokenizer, length=256, samples=windows + 96, seed=seed).ids
    calibration, held_out, test = drawn[:windows], drawn[windows : windows + 48], drawn[windows + 48 :]
    start = time.monotonic()
    dtype = getattr(torch, stream.anatomy.dtype)
    menu = list(dict.fromkeys(resolve(name, group_size=64, dtype=dtype) for name in MENU))
    prices = price(stream, calibration, formats=menu, seed=seed, folder=folder)[1]
    seconds = time.monotonic() - start
    common = {"stream": stream, "calibration": calibration, "prices": prices, "saliency": folder}
    curve = Curve.fit(probe(held_out=held_out, formats=UNIFORM, **common))
    plans = {budget: _planned(prices, budget, stream, curve) for budget in BUDGETS}
    uniform = {name: uniform_plan(prices, name) for name in UNIFORM}
    equal = {name: _planned(prices, _bytes_of(decisions, prices), stream, curve) for name, decisions in uniform.items()}
    candidates: dict[str, Sequence[Decision]] = {f"plan {budget}": plan.decisions for budget, plan in plans.items()}
    candidates |= {f"uniform {name}": decisions for name, decisions in uniform.items()}
    candidates |= {f"equal {name}": plan.decisions for name, plan in equal.items()}
    measured = measure(stream, test, _edits(stream, calibration, folder, candidates), context=calibration)
    labels = {"equal": "circuitpress", "uniform": "control:uniform", "nearest": "control:nearest"}
    quality = [
        {
            "checkpoint": checkpoint.name,
            "text": text.name,
            "method": label,
            "budget": name,
            "seed": seed,
            "bits_per_weight": 8 * sum(d.nbytes for d in (equal[name].decisions if key == "equal" else uniform[name]))
            / stream.anatomy.linear_numel,
            "kl": measured[f"{key} {name}"].kl,
            "kl_stderr": measured[f"{key} {name}"].kl_stderr,
            "perplexity": measured[f"{key} {name}"].perplexity,
            "top1_agreement": measured[f"{key} {name}"].top1_agreement,
            "seconds": seconds,
        }
        for name in UNIFORM
        for key, label in labels.items()
    ]  # fmt: skip
    prediction = [
        {
            "checkpoint": checkpoint.name,
            "plan": budget,
            "seed": seed,
            "bits_per_weight": plan.bits_per_weight,
            "predicted_kl": plan.predicted_kl,
            "predicted_kl_corrected": plan.predicted_kl_corrected,
            "kl": measured[f"plan {budget}"].kl,
        }
        for budget, plan in plans.items()
    ]
    if seed > 0:
        return quality, prediction, []
    rows = exact(held_out=held_out[:16], singles=choose_singles(prices, UNIFORM, 1.0), **common)
    summary = {"checkpoint": checkpoint.name, "spearman": rows["spearman"], "median_ratio": rows["median_ratio"]}
    return quality, prediction, [summary | row for row in rows["rows"]]


def _planned(prices: Prices, budget: str, stream: Stream, curve: Curve) -> Plan:
    return make_plan(prices, budget=budget, other_bytes=stream.anatomy.other_bytes, curve=curve)


def _bytes_of(decisions: Sequence[Decision], prices: Prices) -> str:
    # The last digit is rounded up: it is worth less than a byte.
    bits = 8 * sum(decision.nbytes for decision in decisions) / int(prices.numel.sum())
    return f"{np.ceil(bits * 1e9) / 1e9:.9f}bpw"


def _edits(stream: Stream, calibration: Tensor, saliency: Path, candidates: Mapping[str, Sequence[Decision]]) -> Any:
    layouts = {label: segments_by_module(decisions) for label, decisions in candidates.items()}
    count = len(stream.batches(calibration))

    def edits(index: int, module: nn.Module, inputs: Callable[[int], Tensor]) -> Mapping[str, Edit]:
        place = stream.anatomy.blocks[index]
        hessians = block_hessians(stream, module, place, inputs, count, saliency)
        change = partial(replace, module, transposed=place.matrices[0].transposed)
        result: dict[str, Edit] = {}
        for label, layout in layouts.items():
            weights = decoded_in_place(round_block(module, place, layout, hessians, None), place, None)
            result[label] = partial(change, weights)
        for name in UNIFORM:
            nearest = {place.local(m): _nearest(weight_of(module, place, m).float(), name) for m in place.matrices}
            result[f"nearest {name}"] = partial(change, nearest)
        return result

    return edits


def _nearest(weight: Tensor, name: str) -> Tensor:
    """Round-to-nearest on the grid from minimum to maximum of each group, as most tools do without calibration."""
    form = parse(name)
    assert isinstance(form, IntFormat)
    pieces = []
    for group in weight.split(form.group_size, dim=1):
        low, high = group.amin(1, keepdim=True).clamp(max=0), group.amax(1, keepdim=True).clamp(min=0)
        scale = ((high - low) / (2**form.bits - 1)).half().float().clamp(min=2**-24)
        zero = (-low / scale).round()
        pieces.append(((group / scale + zero).round().clamp(0, 2**form.bits - 1) - zero) * scale)
    return torch.cat(pieces, 1)


def _show(checkpoint: str, seed: int, quality: list[Row], prediction: list[Row], singles: list[Row]) -> None:
    for name in UNIFORM:
        kl = {row["method"]: row["kl"] for row in quality if row["budget"] == name}
        ours, gptq, nearest = (kl[label] for label in ("circuitpress", "control:uniform", "control:nearest"))
        click.echo(
            f"{checkpoint} seed {seed} at the bytes of {name}: KL {ours:.5f}, uniform GPTQ {gptq:.5f} "
            f"({ours / gptq - 1:+.1%}), nearest {nearest:.5f} ({ours / nearest - 1:+.1%})"
        )
    for row in prediction:
        click.echo(
            f"{checkpoint} seed {seed} {row['plan']} ({row['bits_per_weight']:.4f}): "
            f"predicted {row['predicted_kl']:.5f}, corrected {row['predicted_kl_corrected']:.5f}, "
            f"measured {row['kl']:.5f} ({row['predicted_kl_corrected'] / row['kl'] - 1:+.1%})"
        )
    if singles:
        spearman, ratio = (singles[0][key] for key in ("spearman", "median_ratio"))
        click.echo(f"{checkpoint}: {len(singles)} single changes, Spearman {spearman:.4f}, median ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
