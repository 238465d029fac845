"""The commands about circuits: the group `circuit`. Thin and lazy, as all of the command line."""

from typing import Any

import click

from .command import FOLDER, HELP, command, device
from .console import Console

_behavior = click.option("--behavior", type=FOLDER, required=True, help="Contrast pairs: a .yaml or .jsonl.")
_name = click.option("--name", help="Which behavior of the file. Default: the only one.")
_seed = click.option("--seed", type=int, default=0, show_default=True, help="Of everything that is drawn.")


@click.group(context_settings=HELP)
def circuit() -> None:
    """Find the parts that do a behavior, and prove it.

    A circuit can be protected in a plan: circuit.json lists its parts as `--protect` takes them.
    """


@circuit.add_command
@command(
    "circuitpress circuit find MODEL --behavior induction.yaml --out runs/induction",
    "circuitpress circuit find MODEL --behavior F --name ioi --edges --faithfulness 0.85 --out runs/ioi",
)
@click.argument("model")
@_behavior
@_name
@click.option(
    "--method", type=click.Choice(["ig", "attribution"]), default="ig", show_default=True,
    help="Integrated gradients, or one gradient: cheap, and often wrong where a model is sure.",
)  # fmt: skip
@click.option("--nodes/--edges", default=True, show_default=True, help="Heads and MLPs, or the paths between them.")
@click.option(
    "--selection", type=click.Choice(["top", "greedy"]), default="top", show_default=True,
    help="Of edges: the best ones, or grown from the logits.",
)  # fmt: skip
@click.option("--size", type=click.IntRange(1), help="Nodes or edges at the cut. Default: what --faithfulness needs.")
@click.option("--faithfulness", type=click.FloatRange(0, 1, min_open=True), help="What to reach. Default: 0.9.")
@click.option("--steps", type=click.IntRange(1), default=5, show_default=True, help="Points of integration.")
@click.option("--tolerance", type=float, default=0.01, show_default=True, help="A loss of faithfulness that is none.")
@click.option(
    "--window", type=click.IntRange(0), default=32, show_default=True, help="Parts ablated on each side of the cut."
)
@_seed
@click.option("--out", type=FOLDER, required=True, help="Folder for circuit.json and circuit.svg.")
@device
def find(console: Console, model: str, **options: Any) -> None:
    """Find the circuit of a behavior.

    Gradients rank heads, MLPs or edges; exact ablation decides at the cut. The next step is `circuit verify`.
    """
    from .run.circuits import find

    console.result(*find(model, console, **options))


@circuit.add_command
@command(
    "circuitpress circuit verify MODEL --circuit runs/induction/circuit.json --behavior induction.yaml",
    "circuitpress circuit verify MODEL --circuit C --behavior F --ablation mean --random 300 --out runs/check",
)
@click.argument("model")
@click.option("--circuit", "path", type=FOLDER, required=True, help="The circuit.json that `circuit find` wrote.")
@_behavior
@_name
@click.option(
    "--ablation", type=click.Choice(["resample", "mean", "zero"]), default="resample", show_default=True,
    help="What takes the place of all other parts.",
)  # fmt: skip
@click.option(
    "--random", type=click.IntRange(1), default=100, show_default=True, help="Circuits drawn to compare with."
)
@click.option("--subsets", type=click.IntRange(0), default=10, show_default=True, help="Parts drawn for completeness.")
@_seed
@click.option("--out", type=FOLDER, help="Folder for verify.json. Default: the circuit's.")
@device
def verify(console: Console, model: str, **options: Any) -> None:
    """Test a circuit by ablation.

    Faithfulness, completeness, minimality, random circuits of the same size, CPR and CMD, redundant heads. All causal.
    """
    from .run.circuits import verify

    console.result(*verify(model, console, **options))
