"""Do named behaviors survive better when a run is told to keep them? At equal bytes, on prompts that nothing saw.

For each checkpoint every behavior of the file that the dense model does (80 % right, and no coin), in two runs at the
same budget: one that is told nothing, and one whose recipe names all of them, to the last of their margins. Both are
judged on the half of the pairs that was used for nothing, and on test text.

`likeness` is the rank correlation, over all groups, of what the first format of the offer costs the behavior and what
it costs text: near 1, what the behavior needs is what text needs, and a plan has nothing to move from one to the other.

    python benchmarks/behaviors.py --checkpoint DIR --text FILE --test FILE [--budget 2.5bpw] [--refine 0]
"""

from pathlib import Path
from typing import Any

import click
import yaml
from scipy.stats import spearmanr
from transformers import AutoTokenizer

from circuitpress.behaviors import load_behaviors
from circuitpress.console import Console
from circuitpress.recipe import Recipe
from circuitpress.run import run_recipe
from circuitpress.score.ability import ability
from circuitpress.stream import open_stream
from circuitpress.units import Prices
from common import load_rows, readable_text, save_results

FORMATS = ("code2g64", "code3g64", "code4g64", "int2g64s6", "int3g64s6", "int4g64s6", "int5g64s6", "int6", "int8")
NOTHING = {"keep": 1e-6, "weight": 0.0}
"""A behavior that is judged and otherwise ignored: a floor that everything meets, and no say in rounding."""
_PATH = click.Path(path_type=Path, exists=True)


@click.command()
@click.option("--checkpoint", type=_PATH, required=True)
@click.option("--text", type=_PATH, required=True, help="calibration text")
@click.option("--test", type=_PATH, required=True, help="test text")
@click.option("--file", type=_PATH, default=Path("recipes/behaviors/builtin.yaml"), show_default=True)
@click.option("--budget", default="2.5bpw", show_default=True)
@click.option("--samples", default=400, show_default=True, help="pairs of each behavior, where there are so many")
@click.option("--keep", default=1.0, show_default=True, help="of the mean margin")
@click.option("--weight", default=0.0, show_default=True)
@click.option("--windows", default=64, show_default=True, help="of 256 tokens, to calibrate on")
@click.option("--refine", default=0, show_default=True, help="steps")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/behaviors"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/behaviors.json"))
def main(
    checkpoint: Path, text: Path, test: Path, file: Path, budget: str, samples: int, keep: float, weight: float,
    windows: int, refine: int, work: Path, out: Path,
) -> None:  # fmt: skip
    """Compresses twice and writes both rows."""
    work = work / f"{checkpoint.name}-{budget}-{refine}"
    work.mkdir(parents=True, exist_ok=True)
    tokenizer, stream = AutoTokenizer.from_pretrained(checkpoint), open_stream(checkpoint)
    larger = _with_samples(file, work, samples)
    able = [b.name for b in load_behaviors(larger, tokenizer, unfit={}) if ability(stream, b).is_able]
    click.echo(f"{checkpoint.name}: {', '.join(able)}")
    base: dict[str, Any] = {
        "data.calibration": str(readable_text(text, tokenizer, work)),
        "data.test": str(readable_text(test, tokenizer, work)),
        "data.samples": windows,
        "data.length": 256,
        "plan.budget": budget,
        "plan.formats": list(FORMATS),
        "plan.probes": [],
        "plan.swaps": 0,
        "score.exact": 0.0,
        "refine.steps": refine,
        "refine.written": 0,
        "run.device": "cpu",
    }
    rows = []
    for method, settings in (("told nothing", NOTHING), ("told to keep", {"keep": keep, "weight": weight})):
        entries: list[Any] = [{"name": name, "file": str(larger), "of": "margin", **settings} for name in able]
        recipe = Recipe(model=str(checkpoint.resolve())).replace(base | {"behaviors": entries})
        folder = work / method.replace(" ", "-")
        document = run_recipe(recipe, folder, Console(quiet=True, json=False, debug=False))[1]
        rows += [
            _row(checkpoint, method, budget, refine, document, behavior)
            | {"likeness": _likeness(folder, behavior["name"])}
            for behavior in document["behaviors"]
        ]
    mine = {(row["checkpoint"], row["budget"], row["refine"]) for row in rows}
    kept = [row for row in load_rows(out) if (row["checkpoint"], row["budget"], row["refine"]) not in mine]
    save_results(out, kept + rows)
    for row in rows:
        click.echo(
            f"{row['method']}: {row['behavior']} accuracy {row['reference_accuracy']:.3f} -> {row['accuracy']:.3f}, "
            f"margin {row['reference_margin']:.3f} -> {row['margin']:.3f}; KL {row['kl']:.4f} at {row['bits']:.3f}"
        )


def _with_samples(file: Path, work: Path, samples: int) -> Path:
    """The file of behaviors with more pairs of each, and paths that hold from anywhere."""
    document = yaml.safe_load(file.read_text())
    for entry in document["behaviors"]:
        entry["samples"] = samples
        if "file" in entry:
            entry["file"] = str((file.parent / entry["file"]).resolve())
            if file.parent.joinpath(entry["file"]).suffix == ".jsonl":
                entry["samples"] = min(samples, len(Path(entry["file"]).read_text().strip().splitlines()))
    path = work / file.name
    path.write_text(yaml.safe_dump(document))
    return path


def _likeness(run: Path, name: str) -> float:
    prices = Prices.load(run / "prices.safetensors")
    behavior = Prices.load(run / "pricing-behaviors" / name / "prices.safetensors")
    first, second = (table.nats[:, table.formats.index(FORMATS[0])] for table in (prices, behavior))
    return float(spearmanr(first, second).statistic)  # pyright: ignore[reportAttributeAccessIssue]


def _row(
    checkpoint: Path, method: str, budget: str, refine: int, document: dict[str, Any], behavior: dict[str, Any]
) -> dict[str, Any]:
    names = ("pairs", "reference_accuracy", "accuracy", "reference_margin", "margin", "kept")
    return {
        "checkpoint": checkpoint.name,
        "method": method,
        "budget": budget,
        "refine": refine,
        "behavior": behavior["name"],
        **{name: behavior[name] for name in names},
        "kl": document["kl"],
        "bits": document["bits_per_weight"],
    }


if __name__ == "__main__":
    main()
