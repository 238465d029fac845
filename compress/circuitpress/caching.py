"""The command `cache`. Thin and lazy, as all of the command line."""

from pathlib import Path

import click

from .command import FOLDER, command, device
from .console import Console


@command(
    "circuitpress cache runs/mine/model --budget 30%",
    "circuitpress cache MODEL_DIR --budget 24kB --text text.txt --length 2048 --windows 16",
)
@click.argument("model", metavar="MODEL_DIR", type=FOLDER)
@click.option("--budget", required=True, help="Percent of the cache in 16 bits (30%), or bytes of a token (24kB).")
@click.option("--text", type=FOLDER, help="Text to price heads on. Default: the one in circuitpress.")
@click.option("--windows", type=click.IntRange(2), default=16, show_default=True, help="Windows of text.")
@click.option("--length", type=click.IntRange(2), default=1024, show_default=True, help="Tokens in a window.")
@device
def cache(
    console: Console, model: Path, budget: str, text: Path | None, windows: int, length: int, device: str | None
) -> None:
    """Choose the bits of the key-value cache, head by head.

    Prices the keys and the values of every KV head in 2 to 8 bits, spends the budget and writes the bits into the
    folder's config.json. make_cache of circuitpress.runtime.cache then makes such a cache for the loaded model. Give
    windows as long as the texts that the model will read: only heads that look far back lose anything.
    """
    from .run.caching import cache_model

    console.result(*cache_model(model, budget, console, text=text, windows=windows, length=length, device=device))
