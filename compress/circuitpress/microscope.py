"""The commands that look into a model: `inspect` and the group `sae`. Thin and lazy, as all of the command line."""

from pathlib import Path
from typing import Any

import click

from .command import FOLDER, HELP, command, device
from .console import Console

_text = click.option("--text", type=FOLDER, help="Text to look at. Default: the one in circuitpress.")
_site = click.option("--site", help="Where the SAE reads, such as L4.resid_post. Default: what its folder says.")


def _window(samples: int, length: int) -> Any:
    """The options that say how much text is looked at."""

    def wrap(function: Any) -> Any:
        about = {"type": click.IntRange(1), "show_default": True}
        function = click.option("--length", default=length, help="Tokens in a window.", **about)(function)
        return click.option("--windows", default=samples, help="Windows of text.", **about)(function)

    return wrap


@command(
    "circuitpress inspect path/to/checkpoint --out runs/look",
    "circuitpress inspect MODEL --what lens,attention --text text.txt --out runs/look",
    "circuitpress inspect MODEL --what text --unit L3.head.2 --unit L3.neuron.17 --out runs/look",
)
@click.argument("model")
@click.option("--out", type=FOLDER, required=True, help="Folder for the json and svg files.")
@click.option("--what", help="Comma-separated: lens, attention, residual, weights, text, probe. Default: all.")
@click.option("--unit", "units", multiple=True, metavar="UNIT", help="A head or neuron for `text`; may be repeated.")
@_text
@_window(32, 128)
@click.option("--seed", type=int, default=0, show_default=True, help="Of windows and random tokens.")
@device
def inspect(console: Console, model: str, out: Path, what: str | None, **options: Any) -> None:
    """Show what a model attends to, writes and predicts inside.

    One json and one figure a view. All of it is correlational, and each says what it cannot prove.
    """
    from .run.inspecting import inspect_model

    views = [name.strip() for name in what.split(",")] if what else []
    console.result(*inspect_model(model, console, out=out, what=views, **options))


@click.group(context_settings=HELP)
def sae() -> None:
    """Train and use sparse autoencoders.

    SAELens and sparsify folders and Gemma Scope files are read as well.
    """


@sae.add_command
@command(
    "circuitpress sae train path/to/checkpoint --site L4.resid_post --latents 2048 --k 32 --out runs/sae",
    "circuitpress sae train MODEL --site L4.mlp_out --latents 4096 --k 16 --architecture batchtopk --out runs/sae",
)
@click.argument("model")
@click.option("--site", required=True, help="L<layer>.resid_pre, resid_post, attn_out, mlp_out, head_out or neurons.")
@click.option("--latents", type=click.IntRange(1), required=True, help="Number of features to learn.")
@click.option("--k", type=click.IntRange(1), required=True, help="Features used for a token.")
@click.option("--out", type=FOLDER, required=True, help="The SAE's folder, in SAELens's format.")
@click.option("--text", type=FOLDER, help="Text to train on. Default: the one in circuitpress.")
@click.option("--tokens", type=click.IntRange(1), default=1_000_000, show_default=True, help="Tokens to train on.")
@click.option(
    "--architecture", type=click.Choice(["topk", "batchtopk", "jumprelu"]), default="topk", show_default=True,
    help="batchtopk is saved as a jumprelu.",
)  # fmt: skip
@click.option("--steps", type=click.IntRange(1), help="Batches. Default: every token once.")
@click.option("--batch", type=click.IntRange(1), default=1024, show_default=True, help="Tokens in a batch.")
@click.option("--lr", type=float, help="Peak learning rate. Default: by the number of latents and steps.")
@click.option("--length", type=click.IntRange(2), default=256, show_default=True, help="Tokens in a window.")
@click.option("--skip", type=click.IntRange(0), default=1, show_default=True, help="First positions to leave out.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of windows, order and weights.")
@device
def train(console: Console, model: str, **options: Any) -> None:
    """Learn the features of one site.

    The same command again resumes. The result is judged on text that it was not trained on.
    """
    from .run.saes import train_sae

    console.result(*train_sae(model, console, **options))


@sae.add_command
@command(
    "circuitpress sae score path/to/checkpoint runs/sae --text test.txt",
    "circuitpress sae score MODEL params.npz --site L20.resid_post --behaviors behaviors.yaml",
)
@click.argument("model")
@click.argument("sae_folder", metavar="SAE", type=FOLDER)
@_site
@_text
@_window(64, 256)
@click.option("--behaviors", type=FOLDER, help="Attribute to behaviors. Default: to the loss on the text.")
@click.option("--top", type=click.IntRange(1), default=10, show_default=True, help="Features to close exactly.")
@click.option("--integrate", type=click.IntRange(1), default=10, show_default=True, help="Points on the path.")
@device
def score(console: Console, model: str, sae_folder: Path, **options: Any) -> None:
    """Measure an SAE and what its features do.

    FVU, L0, loss recovered by splicing, and the features' contributions: by gradients, the largest ones exactly.
    """
    from .run.saes import score_sae

    console.result(*score_sae(model, sae_folder, console, **options))


@sae.add_command
@command(
    "circuitpress sae features path/to/checkpoint runs/sae --out runs/features",
    "circuitpress sae features MODEL SAE --feature 12 --feature 400 --text text.txt --out runs/features",
)
@click.argument("model")
@click.argument("sae_folder", metavar="SAE", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Folder for features.json and features.svg.")
@click.option("--feature", "features", type=click.IntRange(0), multiple=True, help="A feature; may be repeated.")
@click.option("--count", type=click.IntRange(1), default=12, show_default=True, help="Features, if none is named.")
@_site
@_text
@_window(128, 128)
@device
def features(console: Console, model: str, sae_folder: Path, **options: Any) -> None:
    """Show the text on which features fire.

    The highest peaks and random excerpts, as json and as a figure. Correlational.
    """
    from .run.saes import show_features

    console.result(*show_features(model, sae_folder, console, **options))


_drawn = click.option("--seed", type=int, default=0, show_default=True, help="Of windows and excerpts.")


@sae.add_command
@command(
    "circuitpress sae explain path/to/checkpoint runs/sae --out runs/labels",
    "circuitpress sae explain MODEL SAE --feature 12 --feature 400 --shown 20 --out runs/labels",
)
@click.argument("model")
@click.argument("sae_folder", metavar="SAE", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Folder for prompts.jsonl.")
@click.option("--feature", "features", type=click.IntRange(0), multiple=True, help="A feature; may be repeated.")
@click.option("--count", type=click.IntRange(1), default=24, show_default=True, help="Features, if none is named.")
@click.option("--shown", type=click.IntRange(1), default=10, show_default=True, help="Excerpts in a prompt.")
@_site
@_text
@_window(512, 64)
@_drawn
@device
def explain(console: Console, model: str, sae_folder: Path, **options: Any) -> None:
    """Write prompts that ask for labels of features.

    A prompt shows the text on which a feature peaks, and can be given to any language model. None is called here.
    """
    from .run.labels import explain_features

    console.result(*explain_features(model, sae_folder, console, **options))


@sae.add_command
@command("circuitpress sae labels MODEL runs/sae --labels runs/labels/prompts.jsonl --judge JUDGE --out runs/labels")
@click.argument("model")
@click.argument("sae_folder", metavar="SAE", type=FOLDER)
@click.option("--labels", type=FOLDER, required=True, help="The prompts.jsonl with labels, or rows of feature, label.")
@click.option("--judge", required=True, help="Any causal language model: a folder or a Hub id.")
@click.option("--out", type=FOLDER, required=True, help="Folder for labels.json.")
@click.option("--texts", type=click.IntRange(2), default=10, show_default=True, help="Excerpts of each kind.")
@_site
@_text
@_window(512, 64)
@_drawn
@device
def labels(console: Console, model: str, sae_folder: Path, **options: Any) -> None:
    """Score labels of features by detection.

    Can a judge tell with a label on which text the feature fires? On text that made no prompt, beside the same with
    another feature's label. Labels stay unproven.
    """
    from .run.labels import score_labels

    console.result(*score_labels(model, sae_folder, console, **options))


@sae.add_command
@command("circuitpress sae steer path/to/checkpoint runs/sae --feature 12 --alpha 4 --alpha -4")
@click.argument("model")
@click.argument("sae_folder", metavar="SAE", type=FOLDER)
@click.option("--feature", type=click.IntRange(0), required=True, help="The feature whose direction is added.")
@click.option("--alpha", "alphas", type=float, multiple=True, default=(4.0,), show_default=True, help="How much of it.")
@_site
@_text
@_window(16, 128)
@device
def steer(console: Console, model: str, sae_folder: Path, **options: Any) -> None:
    """Add a feature to the model and measure the change.

    KL, loss and the tokens that become likelier, beside a random direction of the same norm. Causal.
    """
    from .run.saes import steer_model

    console.result(*steer_model(model, sae_folder, console, **options))
