"""Does rounding that spares SAE features keep more of a model than Fisher alone? At equal bytes, beside a control.

An SAE of the residual stream is trained on the calibration text (kept under --work, or given by --sae). Then runs at
one budget, which differ in one thing, the Hessian that weights are rounded with:

- `fisher`: that of the text's predictions
- `features`: that, and the one of the features that cost most to close, times --weight
- `control:shuffled`: the same weights given to other features that fire, drawn by --draws seeds

Plans are made alike: prices are those of the text. Measured on test text: KL, top-1, the share of features that survive
(correlation of 0.9 with the original), of all that fire often enough and of the --top that cost most to close there,
and every built-in behavior that the dense model does, on its accuracy and margin.

Then, at every --side-budget, features as a side path of low rank for the matrices that read them (`side_paths.py`).

    python benchmarks/features.py --checkpoint DIR --text FILE --test FILE [--budget 2.5bpw] [--sae DIR]
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from circuitpress.audit import survival
from circuitpress.behaviors import Behavior, load_behaviors
from circuitpress.console import Console
from circuitpress.data import load_windows
from circuitpress.features import Choose, Importance, price_features, strongest
from circuitpress.mech.sae import Sae, load_sae
from circuitpress.recipe import Recipe
from circuitpress.run import prepare, run_recipe
from circuitpress.run.saes import train_sae
from circuitpress.run.sparing import FOLDER
from circuitpress.score.ability import ability
from circuitpress.stream import Stream, open_stream
from circuitpress.units import Prices
from common import load_rows, readable_text, save_results
from side_paths import side_paths

_PATH = click.Path(path_type=Path, exists=True)
LENGTH = 256


@click.command()
@click.option("--checkpoint", type=_PATH, required=True)
@click.option("--name", help="of the checkpoint in the results; default: its folder's")
@click.option("--text", type=_PATH, required=True, help="calibration text")
@click.option("--test", type=_PATH, required=True, help="test text")
@click.option("--sae", "sae_folder", type=_PATH, help="an SAE of L<layer>.resid_post; default: train one")
@click.option("--layer", default=-1, show_default=True, help="of the SAE that is trained; -1 is the middle")
@click.option("--latents", default=2048, show_default=True)
@click.option("--tokens", default=1_000_000, show_default=True, help="to train on")
@click.option("--budget", default="2.5bpw", show_default=True)
@click.option("--top", default=256, show_default=True, help="features that are spared")
@click.option("--weight", "weights", type=float, multiple=True, default=(0.3, 1.0, 3.0), show_default=True)
@click.option("--draws", default=2, show_default=True, help="shuffled controls for each weight")
@click.option("--windows", default=64, show_default=True, help="of 256 tokens, to calibrate on")
@click.option("--side-budget", "side_budgets", type=float, multiple=True, default=(2.5, 3.0, 4.0), show_default=True)
@click.option("--rank", "ranks", type=int, multiple=True, default=(1, 4, 16), show_default=True, help="of side paths")
@click.option("--side-windows", default=32, show_default=True, help="of test text, to measure side paths on")
@click.option("--file", type=_PATH, default=Path("recipes/behaviors/builtin.yaml"), show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/features"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/features.json"))
def main(
    checkpoint: Path, name: str | None, text: Path, test: Path, sae_folder: Path | None, layer: int, latents: int,
    tokens: int, budget: str, top: int, weights: Sequence[float], draws: int, windows: int,
    side_budgets: Sequence[float], ranks: Sequence[int], side_windows: int, file: Path, work: Path, out: Path,
) -> None:  # fmt: skip
    """Compresses once for every method, measures side paths, and writes a row for each."""
    torch.set_num_threads(1)
    name = name or checkpoint.name
    work = work / f"{name}-{budget}"
    work.mkdir(parents=True, exist_ok=True)
    quiet = Console(quiet=True, json=False, debug=False)
    tokenizer, stream = AutoTokenizer.from_pretrained(checkpoint), open_stream(checkpoint)
    text, test = (readable_text(path, tokenizer, work) for path in (text, test))
    if sae_folder is None:
        sae_folder = work / "sae"
        if not (sae_folder / "train.json").exists():
            site = f"L{layer if layer >= 0 else stream.depth // 2}.resid_post"
            train_sae(
                str(checkpoint), quiet, site=site, latents=latents, k=32, out=sae_folder, text=text, tokens=tokens,
                architecture="topk", steps=None, batch=1024, lr=None, length=LENGTH, skip=1, seed=0, device="cpu",
            )  # fmt: skip
    sae = load_sae(sae_folder)
    able = [b for b in load_behaviors(file, tokenizer, unfit={}) if ability(stream, b).is_able]
    ids = load_windows(test, tokenizer, length=LENGTH, samples=64, seed=0).ids
    base = recipe_for(checkpoint, text, test, budget, windows)
    calibration = load_windows(text, tokenizer, length=LENGTH, samples=windows, seed=0).ids
    judged = costly(stream, sae, ids, top, work / "judged")
    assert sae.site is not None  # as `costly` has required
    same = {"checkpoint": name, "site": str(sae.site)}
    rows: list[dict[str, Any]] = []

    def measure(method: str, weight: float, seed: int, choose: Choose | None) -> None:
        entry: list[Any] = [{"sae": str(sae_folder.resolve()), "top": top, "weight": weight}] if choose else []
        recipe, folder = base.replace({"features": entry}), work / f"{method.replace(':', '-')}-{weight:g}-{seed}"
        if choose is not None and not (folder / "report.html").exists():
            prepare(recipe, folder, quiet)
            shards = folder / FOLDER / "0"
            if not (shards / "scores.safetensors").exists():  # what lies there is what the run will take
                made = price_features(stream, calibration, sae, choose, folder=shards)
                made.save(shards / "scores.safetensors")
        document = run_recipe(recipe, folder, quiet)[1]
        about = same | {"part": "rounding", "budget": budget, "method": method, "weight": weight, "seed": seed}
        rows.append(about | {"top": top} | result(document, stream, folder, sae, ids, judged, able))
        click.echo(f"{method} {weight:g}: KL {rows[-1]['kl']:.4f}, {rows[-1]['survivors_top']:.3f} of the top survive")

    measure("fisher", 0.0, 0, None)
    for weight in weights:
        measure("features", weight, 0, strongest(top))
        for seed in range(draws):
            measure("control:shuffled", weight, seed, shuffled(top, seed))
    priced = work / "fisher-0-0"
    directions = sae.directions()[costly(stream, sae, calibration, top, work / "strongest")]
    found = side_paths(
        stream, calibration, ids[:side_windows], directions, sae.site.layer - (sae.site.name == "resid_pre"),
        prices=Prices.load(priced / "prices.safetensors"), shards=priced / "pricing", budgets=side_budgets,
        ranks=ranks, seeds=draws,
    )  # fmt: skip
    rows += [same | {"part": "side path"} | row for row in found]
    told = {(row["part"], row["budget"]) for row in rows}
    kept = [row for row in load_rows(out) if row["checkpoint"] != name or (row["part"], row["budget"]) not in told]
    save_results(out, kept + rows)


def recipe_for(checkpoint: Path, text: Path, test: Path, budget: str, windows: int) -> Recipe:
    """A run without the stages that would blur the comparison."""
    changes = {
        "data.calibration": str(text.resolve()), "data.test": str(test.resolve()), "data.samples": windows,
        "data.length": LENGTH, "plan.budget": budget, "plan.probes": [], "plan.swaps": 0, "score.exact": 0.0,
        "run.device": "cpu",
    }  # fmt: skip
    return Recipe(model=str(checkpoint.resolve())).replace(changes)


def shuffled(top: int, seed: int) -> Choose:
    """The weights of the strongest features, given to as many others among those that fire."""

    def choose(found: Importance) -> Tensor:
        real = strongest(top)(found)
        (mine,) = real.nonzero(as_tuple=True)
        (firing,) = found.rate.nonzero(as_tuple=True)
        drawn = firing[torch.randperm(len(firing), generator=torch.Generator().manual_seed(seed))][: len(mine)]
        weights = torch.zeros_like(real)
        weights[drawn] = real[mine[: len(drawn)]]
        return weights

    return choose


def costly(stream: Stream, sae: Sae, ids: Tensor, top: int, folder: Path) -> list[int]:
    """The features that cost most to close on a text, the costliest first. `folder` takes the shards."""
    seen: list[Importance] = []

    def choose(found: Importance) -> Tensor:
        seen.append(found)
        return strongest(1)(found)

    price_features(stream, ids, sae, choose, folder=folder)
    return seen[0].closing.topk(top).indices.tolist()


def result(
    document: dict[str, Any], stream: Stream, folder: Path, sae: Sae, ids: Tensor, judged: list[int],
    able: Sequence[Behavior],
) -> dict[str, Any]:  # fmt: skip
    """What is measured of a finished run."""
    model = open_stream(folder / "model")
    found = survival(stream, model, sae, ids)
    told = found.correlation[judged]
    told = told[np.isfinite(told)]
    behaviors = {}
    for behavior in able:
        was, is_now = ability(stream, behavior), asdict(ability(model, behavior))
        behaviors[behavior.name] = {"reference_accuracy": was.accuracy, "reference_mean": was.mean} | {
            key: is_now[key] for key in ("accuracy", "mean")
        }
    return {
        "bits_per_weight": document["bits_per_weight"],
        "kl": document["kl"],
        "top1_agreement": document["top1_agreement"],
        "survivors": found.survivors,
        "survivors_top": float((told >= 0.9).mean()),
        "correlation_top": float(told.mean()),
        "behaviors": behaviors,
    }


if __name__ == "__main__":
    main()
