"""The command that publishes: `push`. Thin and lazy."""

from pathlib import Path
from typing import Any

import click

from .command import FOLDER, command, device
from .console import Console, size, table


@command(
    "circuitpress push runs/mine/model user/name --dry-run",
    "circuitpress push runs/mine/model user/name --private --base meta-llama/Llama-3.2-1B",
)
@click.argument("folder", metavar="MODEL_DIR", type=FOLDER)
@click.argument("repo", metavar="USER/NAME")
@click.option("--base", help="The original's Hub id. Default: what the recipe says.")
@click.option("--licence", "--license", help="The original's licence id. Default: what its card or LICENSE says.")
@click.option("--private", is_flag=True, help="Make a repository that only you see.")
@click.option("--revision", help="A branch. Default: main.")
@click.option("--dry-run", is_flag=True, help="Show the files and the card; send nothing.")
@device
def push(
    console: Console, folder: Path, repo: str, dry_run: bool, device: str | None, **options: Any
) -> None:  # fmt: skip
    """Publish a model on the Hugging Face Hub.

    With a card that says what was done, what was measured and how to load it. Interrupted, the same command goes on.
    """
    from .hub import prepare, send

    del device  # nothing is computed
    upload = prepare(folder, repo, **options)
    sizes = upload.sizes()
    rows = [("file", "size"), *((name, size(nbytes)) for name, nbytes in sizes.items())]
    where = f"{repo}{'@' + upload.revision if upload.revision else ''}"
    document: dict[str, Any] = {"repo": repo, "revision": upload.revision, "files": sizes, "dry_run": dry_run}
    document |= {"warnings": list(upload.warnings), "card": upload.card}
    notes = "".join(f"\nwarning: {warning}" for warning in upload.warnings)
    total = size(sum(sizes.values()))
    if dry_run:
        head = table(f"{len(sizes)} files, {total}, would go to {where}; nothing was sent", rows)
        console.result(f"{upload.card}\n{head}{notes}", document)
        return
    with console.progress("push", 1) as advance:
        url = send(upload, advance=advance)
    console.result(f"{len(sizes)} files, {total}: {url}{notes}", document | {"url": url})
