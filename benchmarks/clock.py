"""How long compressing takes beside other calibrated compressors: the same checkpoint, tokens and cores, in one run.

Imports, loading and tokenising are outside every clock; ours holds scoring, planning and writing the packed model, and
reading the weights of the blocks again for each of them. Judging it, which the peers do not do, is outside.

    python benchmarks/clock.py --checkpoint DIR --text FILE [--checkpoint DIR --text FILE ...] --cache ENVIRONMENTS
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from circuitpress.anatomy import read_anatomy
from circuitpress.bench import peers_folder, settings
from circuitpress.bench.environments import ENVIRONMENTS, ensure
from circuitpress.bench.jobs import Outcome, run_peers
from circuitpress.bench.ours import ours, recipe_for
from circuitpress.console import Console
from circuitpress.data import load_windows
from circuitpress.recipe import Recipe
from common import load_rows, readable_text, save_results

METHODS = {
    "int3g64 only": ("int3g64",),
    "five integer formats": ("int2g64", "int3g64", "int4g64", "int5g64", "int6g64"),
    "trellis and integers": ("trellis2", "trellis3", "trellis4", "int4g64", "int6g64"),
}
"""What our plan chooses from. The first does what the peers do: one format, GPTQ on a Hessian."""
PEERS = ("llmcompressor", "gptqmodel", "autoround")


@click.command()
@click.option("--checkpoint", "checkpoints", type=click.Path(path_type=Path, exists=True), multiple=True, required=True)
@click.option("--text", "texts", type=click.Path(path_type=Path, exists=True), multiple=True, required=True)
@click.option("--peers", default=",".join(PEERS), show_default=True)
@click.option("--windows", default=128, show_default=True, help="of 256 tokens")
@click.option("--cache", type=click.Path(path_type=Path), help="the peers' environments")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/clock.json"))
def main(
    checkpoints: tuple[Path, ...], texts: tuple[Path, ...], peers: str, windows: int, cache: Path | None, out: Path
) -> None:  # fmt: skip
    """Times everybody once on each checkpoint, one thread."""
    torch.set_num_threads(1)
    for checkpoint, text in zip(checkpoints, texts, strict=True):
        with tempfile.TemporaryDirectory() as work:
            rows = list(_rows(checkpoint, text, peers.split(","), windows, cache or peers_folder(), Path(work)))
        fastest = min(row["cpu_seconds"] for row in rows if row["method"] in peers.split(","))
        rows = [row | {"ratio": row["cpu_seconds"] / fastest} for row in rows]
        save_results(out, [row for row in load_rows(out) if row["checkpoint"] != checkpoint.name] + rows)
        for row in rows:
            click.echo(f"{row['checkpoint']} {row['method']}: {row['cpu_seconds']:.1f} s, {row['ratio']:.2f}")


def _rows(
    checkpoint: Path, text: Path, peers: list[str], windows: int, cache: Path, work: Path
) -> Iterator[dict[str, Any]]:
    tokenizer, anatomy = AutoTokenizer.from_pretrained(checkpoint), read_anatomy(checkpoint)
    text = readable_text(text, tokenizer, work)
    ids = load_windows(text, tokenizer, length=256, samples=windows, seed=0, vocab=anatomy.vocab).ids
    save_file({"ids": ids}, work / "ids.safetensors")
    for name in peers:
        setting = settings([name], [3], groups=[64])[0]
        environment = ENVIRONMENTS[setting.environment]
        (outcome,) = run_peers(
            [setting], anatomy, work / "ids.safetensors", environment=environment, python=ensure(environment, cache),
            work=work, threads=1, timeout=7200,
        )  # fmt: skip
        yield _row(checkpoint, name, outcome)
    quiet = Console(quiet=True, json=False, debug=False)
    for name, formats in METHODS.items():
        base = Recipe(model=str(checkpoint)).replace(
            {"plan.formats": list(formats), "plan.probes": [], "plan.swaps": 0, "run.device": "cpu"}
        )
        recipe = recipe_for(base, checkpoint, text, samples=windows, length=256)
        (outcome,) = ours(recipe, [3.6], work=work / name, console=quiet)
        yield _row(checkpoint, f"circuitpress, {name}", outcome)


def _row(checkpoint: Path, method: str, outcome: Outcome) -> dict[str, Any]:
    if outcome.error is not None:
        raise click.ClickException(f"{method} on {checkpoint.name}: {outcome.error}")
    return {
        "checkpoint": checkpoint.name,
        "method": method,
        "seconds": outcome.seconds,
        "cpu_seconds": outcome.cpu_seconds,
        "settings": dict(outcome.settings),
        "versions": dict(outcome.versions),
    }


if __name__ == "__main__":
    main()
