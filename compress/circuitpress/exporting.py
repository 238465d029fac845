"""The command `export`. Thin and lazy, as all of the command line."""

from pathlib import Path
from typing import Any

import click

from .command import FOLDER, command, device
from .console import Console


@command(
    "circuitpress export runs/mine/model --format compressed-tensors --out exports/mine",
    "circuitpress export runs/mine/model --format dense --dtype bfloat16 --out exports/mine-dense",
    "circuitpress export runs/mine/model --format gguf --out exports/mine-gguf --dry-run",
)
@click.argument("model", metavar="MODEL_DIR", type=FOLDER)
@click.option(
    "--format", "target", required=True,
    type=click.Choice(["compressed-tensors", "bitsandbytes", "gguf", "dense"]),
    help="Who loads it: vLLM, transformers, llama.cpp, everything (as 16-bit numbers).",
)  # fmt: skip
@click.option("--out", type=FOLDER, required=True, help="The folder to write; an earlier export there is replaced.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of all that is not packed. Default: the checkpoint's own.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what would be written, or why it cannot be.")
@device
def export(console: Console, model: Path, target: str, out: Path, **options: Any) -> None:
    """Write a model for another runtime.

    Loads the folder in a fresh process without circuitpress and compares its logits; on a mismatch nothing is kept.
    The model must have been planned for the runtime: --set plan.target=compressed-tensors. `dense` takes any.
    """
    from .run.exporting import export_model

    console.result(*export_model(model, target, out, console, **options))
