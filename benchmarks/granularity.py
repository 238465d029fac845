"""What does it buy to decide inside a matrix rather than per matrix?

For each checkpoint and seed, the model is priced twice on the same calibration text: with one decision a matrix, and
with decisions by unit (q, k, v rows and o columns by key-value group; neurons sorted by score, gate and up rows and
down columns in blocks of 64). Both are planned for the same bytes and rounded by the same GPTQ. Measured are

- KL(original || compressed) on text that neither saw, through transformers' own forward pass;
- one behavior that the dense model can do: BLiMP pairs, as accuracy and as mean log-odds of the right sentence.

Each is planned for general KL, and once more with the prices of the behavior's own sentences added (`plan: behavior`).

    python benchmarks/granularity.py --checkpoint DIR --text FILE --blimp FILE [--checkpoint ...] --out granularity.json

Rows of other checkpoints in the results file are kept.

A paradigm fits if the dense model is right on 80 % of it and a ruined model is not: of principle_A_domain_1 a model at
2.4 bits gets 100 %, since noise prefers the shorter pronoun.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from circuitpress.data import load_windows
from circuitpress.plan import make_plan
from circuitpress.price import price
from circuitpress.rounding import block_hessians, decoded_in_place, round_block, segments_by_module
from circuitpress.stream import Stream, forward, open_stream
from circuitpress.units import Plan, Prices
from common import dense_copy, load_rows, minimal_pairs, readable_text, save_results

FORMATS = tuple(f"int{bits}g64" for bits in (2, 3, 4, 5, 6, 8))


@click.command()
@click.option("--checkpoint", "checkpoints", type=click.Path(path_type=Path, exists=True), multiple=True, required=True)
@click.option("--text", "texts", type=click.Path(path_type=Path, exists=True), multiple=True, required=True)
@click.option(
    "--blimp", "paradigms", type=click.Path(path_type=Path, exists=True), multiple=True, required=True, help="jsonl"
)
@click.option("--seeds", default=3, show_default=True)
@click.option("--budget", "budgets", type=float, multiple=True, default=(2.375, 2.5, 2.75, 3.0, 4.0), show_default=True)
@click.option("--windows", default=48, show_default=True, help="calibration windows of 256 tokens")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/granularity.json"))
def main(
    checkpoints: tuple[Path, ...], texts: tuple[Path, ...], paradigms: tuple[Path, ...], seeds: int,
    budgets: tuple[float, ...], windows: int, out: Path,
) -> None:  # fmt: skip
    """Compares matrix-wise and unit-wise plans at equal bytes."""
    names = {checkpoint.name for checkpoint in checkpoints}
    rows: list[dict[str, Any]] = [row for row in load_rows(out) if row["checkpoint"] not in names]
    for checkpoint, text, blimp in zip(checkpoints, texts, paradigms, strict=True):
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                rows += _one_seed(checkpoint, text, blimp, seed, budgets, windows, Path(folder))
            save_results(out, rows)
            _show(rows, checkpoint.name, seed)


def _one_seed(
    checkpoint: Path, text: Path, blimp: Path, seed: int, budgets: tuple[float, ...], windows: int, folder: Path
) -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    stream = open_stream(checkpoint)
    pairs = [json.loads(line) for line in blimp.read_text().splitlines()]
    behavior_text = folder / "behavior.txt"
    behavior_text.write_text(" ".join(row["sentence_good"] for row in pairs[:500]))
    text = readable_text(text, tokenizer, folder)
    drawn = load_windows(text, tokenizer, length=256, samples=windows + 48, seed=seed)
    calibration, test = drawn.ids[:windows], drawn.ids[windows:]
    told = load_windows(behavior_text, tokenizer, length=256, samples=16, seed=seed).ids
    dense = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    changed = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    held_out = pairs[500:800]
    reference = minimal_pairs(dense, tokenizer, held_out, drawn.bos)
    expected = [_log_probabilities(dense, part) for part in test.split(8)]
    rows = []
    for granularity in ("matrix", "unit"):
        shards = folder / granularity
        prices = price(stream, calibration, formats=FORMATS, granularity=granularity, seed=seed, folder=shards)[1]
        behavior = price(
            stream, told, formats=FORMATS, granularity=granularity, seed=seed, neuron_order=prices.neuron_order,
            folder=folder / f"{granularity}-behavior",
        )[1]  # fmt: skip
        plans = _plans(prices, behavior, budgets, stream)
        for (purpose, budget), (plan, weights) in zip(
            plans, _round(stream, calibration, prices, shards, plans), strict=True
        ):
            model = dense_copy(stream, weights, changed)
            odds = minimal_pairs(model, tokenizer, held_out, drawn.bos)
            rows.append(
                {
                    "checkpoint": checkpoint.name,
                    "granularity": granularity,
                    "seed": seed,
                    "plan": purpose,
                    "budget": budget,
                    "bits_per_weight": plan.bits_per_weight,
                    "predicted_kl": plan.predicted_kl,
                    "kl": _kl(expected, model, test),
                    "behavior": blimp.stem,
                    "metric": float((odds > 0).float().mean()),
                    "dense_metric": float((reference > 0).float().mean()),
                    "log_odds": float(odds.mean()),
                    "dense_log_odds": float(reference.mean()),
                }
            )
    return rows


def _plans(
    general: Prices, behavior: Prices, budgets: tuple[float, ...], stream: Stream
) -> dict[tuple[str, float], Plan]:
    both = replace(general, nats=general.nats + behavior.nats)
    other = stream.anatomy.other_bytes
    return {
        (purpose, bits): make_plan(prices, budget=f"{bits}bpw", other_bytes=other)
        for purpose, prices in (("general", general), ("behavior", both))
        for bits in (budgets if purpose == "general" else [bits for bits in budgets if bits in (2.5, 3.0)])
        if 8 * general.nbytes.min(1).sum() / general.numel.sum() <= bits
    }


def _round(
    stream: Stream, calibration: Tensor, prices: Prices, shards: Path, plans: dict[tuple[str, float], Plan]
) -> list[tuple[Plan, list[dict[str, Tensor]]]]:
    """The rounded matrices of every plan, block by block, with the Hessians that were priced."""
    layouts = [segments_by_module(plan.decisions) for plan in plans.values()]
    weights: list[list[dict[str, Tensor]]] = [[] for _ in plans]
    batches = stream.batches(calibration)

    def visit(index: int, module: Any, inputs: Any) -> None:
        place = stream.anatomy.blocks[index]
        order = torch.from_numpy(prices.neuron_order[index]) if index in prices.neuron_order else None
        hessians = block_hessians(stream, module, place, inputs, len(batches), shards)
        for layout, found in zip(layouts, weights, strict=True):
            found.append(decoded_in_place(round_block(module, place, layout, hessians, order), place, order))

    forward(stream, batches, stream.store("granularity"), visit=visit)
    return list(zip(plans.values(), weights, strict=True))


@torch.no_grad()
def _log_probabilities(model: Any, windows: Tensor) -> Tensor:
    return model(windows, use_cache=False).logits.log_softmax(-1)


def _kl(expected: list[Tensor], model: Any, windows: Tensor) -> float:
    total = 0.0
    for p, part in zip(expected, windows.split(8), strict=True):
        q = _log_probabilities(model, part)
        total += float((p.exp() * (p - q)).sum(-1).double().sum())
    return total / windows.numel()


def _show(rows: list[dict[str, Any]], checkpoint: str, seed: int) -> None:
    for purpose in ("general", "behavior"):
        for budget in sorted({row["budget"] for row in rows}):
            mine = {
                g: [
                    r
                    for r in rows
                    if (r["checkpoint"], r["granularity"], r["plan"], r["budget"]) == (checkpoint, g, purpose, budget)
                ]
                for g in ("matrix", "unit")
            }
            if not all(mine.values()):
                continue
            kl, metric, odds = (
                {g: np.mean([r[key] for r in part]) for g, part in mine.items()} for key in ("kl", "metric", "log_odds")
            )
            click.echo(
                f"{checkpoint} seeds 0-{seed} {purpose:8} {budget:5.3f} bpw: "
                f"KL matrix {kl['matrix']:.5f} unit {kl['unit']:.5f} ({kl['unit'] / kl['matrix'] - 1:+.1%}); "
                f"accuracy {metric['matrix']:.3f} {metric['unit']:.3f}; "
                f"log-odds {odds['matrix']:.2f} {odds['unit']:.2f}"
            )


if __name__ == "__main__":
    main()
