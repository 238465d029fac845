"""Prices against interventions: every matrix at 2, 3 and 4 bits changed alone, its price and its measured KL.

    python benchmarks/exact.py --checkpoint DIR --text FILE [--checkpoint ...] --out benchmarks/results

Rows of other checkpoints in exact.json are kept.
"""

import tempfile
from pathlib import Path

import click
from transformers import AutoTokenizer

from circuitpress.data import load_windows
from circuitpress.price import price
from circuitpress.probe import choose_singles, exact
from circuitpress.stream import open_stream
from common import load_rows, readable_text, save_results

UNIFORM = ("int2g64", "int3g64", "int4g64")


@click.command()
@click.option("--checkpoint", "checkpoints", type=click.Path(path_type=Path, exists=True), multiple=True, required=True)
@click.option("--text", "texts", type=click.Path(path_type=Path, exists=True), multiple=True, required=True)
@click.option("--windows", default=64, show_default=True, help="calibration windows of 256 tokens")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True)
def main(checkpoints: tuple[Path, ...], texts: tuple[Path, ...], windows: int, out: Path) -> None:
    """Measures every single change on 16 windows that were not priced."""
    for checkpoint, text in zip(checkpoints, texts, strict=True):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tokenizer = AutoTokenizer.from_pretrained(checkpoint)
            file = readable_text(text, tokenizer, folder)
            drawn = load_windows(file, tokenizer, length=256, samples=windows + 16, seed=0).ids
            stream = open_stream(checkpoint)
            prices = price(stream, drawn[:windows], formats=UNIFORM, folder=folder)[1]
            found = exact(
                stream, calibration=drawn[:windows], held_out=drawn[windows:], prices=prices, saliency=folder,
                singles=choose_singles(prices, UNIFORM, 1.0),
            )  # fmt: skip
        summary = {"checkpoint": checkpoint.name, "spearman": found["spearman"], "median_ratio": found["median_ratio"]}
        kept = [row for row in load_rows(out / "exact.json") if row["checkpoint"] != checkpoint.name]
        save_results(out / "exact.json", [*kept, *(summary | row for row in found["rows"])])
        click.echo(f"{checkpoint.name}: Spearman {found['spearman']:.4f}, median ratio {found['median_ratio']:.3f}")


if __name__ == "__main__":
    main()
