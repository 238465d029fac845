"""Our models beside other compressors' at equal bytes, on real checkpoints: `circuitpress bench quality`, many times.

For each checkpoint all peers that run here, our side at their real bits, and the controls, calibrated on the same 128
windows of 256 tokens and judged by one evaluator on two texts: the checkpoint's own test text and a common one.

    python benchmarks/quality.py --checkpoint DIR --text CALIBRATION --test OWN [--checkpoint ...] --also WIKITEXT \\
        --work DIR --out benchmarks/results

A text may end in `:PERCENT` or `PERCENT:` (`stories.txt:80`, `stories.txt:80:`), which takes its first or last part up
to a line's end. Finished jobs are kept in `--work`; rows of other checkpoints in quality.json are kept.
"""

import json
import re
from pathlib import Path

import click
from transformers import AutoTokenizer

from circuitpress.bench import PEERS, Comparison, compare, draw, peers_folder, render, settings
from circuitpress.bench.jobs import Setting
from circuitpress.console import Console
from circuitpress.recipe import Recipe
from common import command_line, commit, load_rows, readable_text, save_results

_PATH = click.Path(path_type=Path)


@click.command()
@click.option("--checkpoint", "checkpoints", type=click.Path(path_type=Path, exists=True), multiple=True, required=True)
@click.option("--text", "texts", multiple=True, required=True, help="calibration text, one for each checkpoint")
@click.option("--test", "tests", multiple=True, required=True, help="own test text, one for each checkpoint")
@click.option("--also", type=click.Path(path_type=Path, exists=True), help="test text for all")
@click.option("--peers", default=",".join(PEERS), show_default=True, help="a peer's own group sizes: autoround:64+32")
@click.option("--bits", default="2,3,4", show_default=True)
@click.option("--groups", default="64,32", show_default=True)
@click.option("--budget", "budgets", type=float, multiple=True, help="ours; default: the best peers' and AutoRound's")
@click.option("--recipe", type=click.Path(path_type=Path, exists=True), help="how our side compresses")
@click.option("--set", "overrides", multiple=True, help="one key of that recipe")
@click.option("--controls/--no-controls", default=True, show_default=True, help="what is left without our plan")
@click.option("--cache", type=_PATH, help="the peers' environments")
@click.option("--work", type=_PATH, default=Path("runs/quality"), show_default=True)
@click.option("--out", type=_PATH, default=Path("benchmarks/results"), show_default=True)
def main(
    checkpoints: tuple[Path, ...], texts: tuple[str, ...], tests: tuple[str, ...], also: Path | None, peers: str,
    bits: str, groups: str, budgets: tuple[float, ...], recipe: Path | None, overrides: tuple[str, ...],
    controls: bool, cache: Path | None, work: Path, out: Path,
) -> None:  # fmt: skip
    """Compares on every checkpoint and writes quality.json and quality.svg."""
    chosen = [setting for peer in peers.split(",") for setting in _settings(peer, _numbers(bits), _numbers(groups))]
    console = Console(quiet=False, json=False, debug=False)
    for checkpoint, text, test in zip(checkpoints, texts, tests, strict=True):
        folder = work / "texts" / checkpoint.name
        found = [_text(spec, checkpoint, folder) for spec in (text, test, *([str(also)] if also else []))]
        model = f"model={checkpoint.resolve()}"
        base = (
            Recipe.load(recipe, overrides=[model, *overrides])
            if recipe
            else Recipe.parse("{}", name="quality", folder=Path(), overrides=[model, *overrides])
        )
        comparison = Comparison(
            str(checkpoint), found[0], {path.name: path for path in found[1:]}, chosen, work, cache or peers_folder(),
            recipe=base, budgets=budgets, controls=controls,
        )  # fmt: skip
        rows = compare(comparison, console)
        kept = [row for row in load_rows(out / "quality.json") if row["checkpoint"] != checkpoint.name]
        # Rows of an earlier version of this file name other things.
        everything = [row for row in kept if "error" in row] + rows
        save_results(
            out / "quality.json", everything,
            commands=_known(out, "commands") | {checkpoint.name: command_line()},
            commits=_known(out, "commits") | {checkpoint.name: commit()},
        )  # fmt: skip
        draw(everything, out / "quality.svg")
        click.echo(render(rows))


def _text(spec: str, checkpoint: Path, folder: Path) -> Path:
    """The file that `spec` names, cut, and without line breaks for a tokenizer that has none."""
    folder.mkdir(parents=True, exist_ok=True)
    match = re.fullmatch(r"(.+?):(\d+)(:?)", spec)
    path = Path(match[1] if match else spec)
    if match:
        whole = path.read_text()
        at = whole.index("\n", len(whole) * int(match[2]) // 100) + 1
        last = match[3] == ":"
        path = folder / f"{path.stem}-{'after' if last else 'first'}-{match[2]}%{path.suffix}"
        path.write_text(whole[at:] if last else whole[:at])
    return readable_text(path, AutoTokenizer.from_pretrained(checkpoint), folder)


def _known(out: Path, what: str) -> dict[str, str]:
    """What the results tell of each checkpoint's rows: the command or the commit behind them."""
    path = out / "quality.json"
    return json.loads(path.read_text()).get(what, {}) if path.exists() else {}


def _settings(peer: str, bits: list[int], groups: list[int]) -> list[Setting]:
    name, _, own = peer.partition(":")
    return settings([name], bits, groups=_numbers(own.replace("+", ",")) if own else groups)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
