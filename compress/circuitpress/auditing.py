"""The commands that compare models and watch inputs: `audit` and the group `monitor`. Thin and lazy."""

from typing import Any

import click

from .command import FOLDER, HELP, command, device
from .console import Console


@command(
    "circuitpress audit runs/mine/model --reference path/to/checkpoint --out runs/audit",
    "circuitpress audit runs/mine/model --reference MODEL --behaviors behaviors.yaml --sae runs/sae --out runs/audit",
    "circuitpress audit MODEL --reference M --behaviors F --circuit runs/induction/circuit.json --out runs/audit",
)
@click.argument("model")
@click.option("--reference", required=True, help="The original, or any model with the same tokenizer.")
@click.option("--out", type=FOLDER, required=True, help="Folder for audit.json and audit.html.")
@click.option("--text", type=FOLDER, help="Text to compare on. Default: the one in circuitpress.")
@click.option("--windows", type=click.IntRange(1), default=16, show_default=True, help="Windows of text.")
@click.option("--length", type=click.IntRange(2), default=256, show_default=True, help="Tokens in a window.")
@click.option("--behaviors", type=FOLDER, help="Behaviors to measure in both models: a .yaml or .jsonl.")
@click.option(
    "--safety/--no-safety", default=True, show_default=True,
    help="For chat models: whether refusals, disagreement and honesty are still there.",
)  # fmt: skip
@click.option(
    "--circuit", "circuits", type=FOLDER, multiple=True,
    help="A circuit.json to verify in both models, on the behavior of --behaviors that it is of; may be repeated.",
)  # fmt: skip
@click.option("--sae", type=FOLDER, help="An SAE of the reference, to see which of its features survive.")
@click.option("--site", help="Where the SAE reads, such as L4.resid_post. Default: what its folder says.")
@device
def audit(console: Console, model: str, **options: Any) -> None:
    """Show what differs inside two models.

    Such as a model and its compression: predictions and behaviors, layers, attention heads that lost their pattern,
    features that survive.
    """
    from .run.auditing import audit_models

    console.result(*audit_models(model, console, **options))


@click.group(context_settings=HELP)
def monitor() -> None:
    """Notice inputs that look unlike the text a model was judged on."""


@monitor.add_command
@command("circuitpress monitor fit MODEL --site L4.resid_post --text train.txt --out runs/monitor.safetensors")
@click.argument("model")
@click.option("--site", required=True, help="Where to look, such as L4.resid_post.")
@click.option("--out", type=FOLDER, required=True, help="The file to write.")
@click.option("--text", type=FOLDER, help="Ordinary text. Default: the one in circuitpress.")
@click.option("--windows", type=click.IntRange(16), default=64, show_default=True, help="Windows of text.")
@click.option("--length", type=click.IntRange(4), default=128, show_default=True, help="Tokens in a window.")
@click.option("--sae", type=FOLDER, help="An SAE of that site: rates of features are watched as well.")
@click.option("--quantile", type=click.FloatRange(0.5, 0.999), default=0.95, show_default=True, help="Not flagged.")
@device
def fit(console: Console, model: str, **options: Any) -> None:
    """Record what ordinary text looks like at a site.

    A part of the text is kept apart to measure how often the record is wrong.
    """
    from .run import auditing

    console.result(*auditing.fit(model, console, **options))


@monitor.add_command
@command("circuitpress monitor check MODEL --monitor runs/monitor.safetensors --text new.txt")
@click.argument("model")
@click.option("--monitor", type=FOLDER, required=True, help="What `monitor fit` wrote.")
@click.option("--text", type=FOLDER, required=True, help="The text to look at.")
@click.option("--windows", type=click.IntRange(1), default=64, show_default=True, help="Windows of text.")
@click.option("--length", type=click.IntRange(4), default=128, show_default=True, help="Tokens in a window.")
@click.option("--sae", type=FOLDER, help="The SAE that the monitor was fitted with.")
@device
def check(console: Console, model: str, **options: Any) -> None:
    """Count the windows of a text that are unusual.

    The model may be the one that was recorded, or what compression made of it: then drift shows.
    """
    from .run import auditing

    console.result(*auditing.check(model, console, **options))
