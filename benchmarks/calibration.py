"""How many calibration tokens a plan needs, and of which text: KL at fixed bytes.

For each calibration text and number of tokens everything that calibration decides is done anew: prices, plan (at
BUDGETS) and rounding. The plans are then measured on the same windows of every test text, so rows differ only by what
they were calibrated on.

    python benchmarks/calibration.py --checkpoint DIR --tokens 4096 --tokens 16384
        --calibration NAME=FILE --test NAME=FILE [--mix NAME+NAME] [--out benchmarks/results]

`--calibration built-in` is the text of the wheel; `--mix a+b` takes half of its windows from either text. A text that
is calibrated on and tested on is cut into disjoint windows. Rows of other checkpoints, texts and numbers are kept.
"""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from torch import Tensor
from transformers import AutoTokenizer

from circuitpress.data import load_windows
from circuitpress.formats import resolve
from circuitpress.plan import make_plan
from circuitpress.price import price
from circuitpress.probe import plan_edits
from circuitpress.score.variants import measure
from circuitpress.stream import Stream, open_stream
from common import load_rows, readable_text, save_results

BUDGETS = ("2.5bpw", "3.0bpw", "4.0bpw")
MENU = ("int2", "int3", "int4", "int6", "dense")
LENGTH = 256
Row = dict[str, Any]


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--tokens", "counts", type=int, multiple=True, default=(16384,), show_default=True)
@click.option("--calibration", "calibrations", multiple=True, required=True, metavar="NAME=FILE")
@click.option("--mix", "mixes", multiple=True, metavar="NAME+NAME")
@click.option("--test", "tests", multiple=True, required=True, metavar="NAME=FILE")
@click.option("--windows", default=48, show_default=True, help="test windows of 256 tokens of each text")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True)
def main(
    checkpoint: Path, counts: tuple[int, ...], calibrations: tuple[str, ...], mixes: tuple[str, ...],
    tests: tuple[str, ...], windows: int, seed: int, out: Path,
) -> None:  # fmt: skip
    """Measures plans calibrated on every text and number of tokens."""
    stream = open_stream(checkpoint)
    with TemporaryDirectory() as folder:
        texts = _texts([*calibrations, *tests], checkpoint, seed, windows + -(-max(counts) // LENGTH), Path(folder))
        tested = {name: texts[name][:windows] for name in _names(tests)}
        pools = {name: texts[name][windows if name in tested else 0 :] for name in _names(calibrations)}
    for mix in mixes:
        parts = [pools[name] for name in mix.split("+")]
        shortest = min(map(len, parts))
        pools[mix] = torch.stack([part[:shortest] for part in parts], 1).flatten(0, 1)
    for name, pool in pools.items():
        for count in counts:
            wanted = -(-count // LENGTH)
            if len(pool) < wanted and wanted > -(-min(counts) // LENGTH):
                click.echo(f"{name} has {len(pool)} windows: {count} tokens are left out")
                continue
            new = _measure(stream, pool[:wanted], tested, seed)
            common = {"checkpoint": checkpoint.name, "calibration": name, "tokens": pool[:wanted].numel(), "seed": seed}
            rows = [common | row for row in new]
            keys = {_key(row) for row in rows}
            kept = [row for row in load_rows(out / "calibration.json") if _key(row) not in keys]
            save_results(out / "calibration.json", kept + rows)
            for row in rows:
                click.echo(" ".join(str(row[key]) for key in row))


def _measure(stream: Stream, calibration: Tensor, tested: Mapping[str, Tensor], seed: int) -> list[Row]:
    dtype = getattr(torch, stream.anatomy.dtype)
    menu = [resolve(name, group_size=64, dtype=dtype) for name in MENU]
    with TemporaryDirectory() as name:
        folder = Path(name)
        prices = price(stream, calibration, formats=menu, seed=seed, folder=folder)[1]
        plans = {budget: make_plan(prices, budget=budget, other_bytes=0) for budget in BUDGETS}
        decisions = {budget: plan.decisions for budget, plan in plans.items()}
        edits = plan_edits(stream, decisions, calibration=calibration, saliency=folder, orders={})
        found = {text: measure(stream, ids, edits, context=calibration) for text, ids in tested.items()}
    return [
        {
            "test": text,
            "budget": budget,
            "bits_per_weight": plans[budget].bits_per_weight,
            "kl": divergences[budget].kl,
            "kl_stderr": divergences[budget].kl_stderr,
            "perplexity": divergences[budget].perplexity,
        }
        for text, divergences in found.items()
        for budget in BUDGETS
    ]


def _texts(entries: list[str], checkpoint: Path, seed: int, samples: int, folder: Path) -> dict[str, Tensor]:
    """Windows of every text by name."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    result = {}
    for entry in entries:
        name, _, file = entry.partition("=")
        path = readable_text(Path(file), tokenizer, folder) if file else None
        result[name] = load_windows(path, tokenizer, length=LENGTH, samples=samples, seed=seed).ids
    return result


def _names(entries: tuple[str, ...]) -> list[str]:
    return [entry.partition("=")[0] for entry in entries]


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("checkpoint", "calibration", "tokens", "seed", "test", "budget"))


if __name__ == "__main__":
    main()
