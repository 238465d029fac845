"""What a run is made from, as digests: weights, texts, recipe, code. A rerun compares them field by field.

Modification times stay out of it: a checkpoint that was copied or downloaded again is the same checkpoint. Weight files
up to 2 GB in all are hashed whole; larger ones by their size, their safetensors header (names, shapes, offsets) and 64
pieces of 1 MiB, which any retrained or rounded checkpoint changes, in a second instead of minutes.
"""

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..checkpoint import read_headers
from ..data import text_digest
from ..errors import CircuitpressError
from ..files import sha256
from ..recipe import Recipe, describe_changes

WHOLE = 2 << 30
_PIECES, _PIECE = 64, 1 << 20

# Where things lie, where they run and what is only compared at the end does not change a result.
_FREE = ("recipe.model", "recipe.data.calibration", "recipe.data.test", "recipe.run.device")
_FREE += ("recipe.evaluate.max_kl", "recipe.evaluate.min_top1", "recipe.evaluate.min_recovery")
_FREE += ("recipe.evaluate.include", "recipe.evaluate.task_data", "recipe.plan.latencies")


def take_fingerprints(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The fingerprints of a run of `recipe` on the checkpoint in `folder`, flat, under dotted names."""
    prints = settings(recipe)
    prints |= {f"weights.{name}": digest for name, digest in digest_checkpoint(folder).items()}
    prints["text.data.calibration"] = text_digest(recipe.data.calibration)
    prints["text.data.test"] = text_digest(recipe.data.test) if recipe.data.test else None
    prints |= {f"text.behaviors.{b.name}": sha256(b.file) for b in recipe.behaviors}
    for number, asked in enumerate(recipe.features):
        files = [asked.sae] if asked.sae.is_file() else sorted(asked.sae.glob("*.safetensors"))
        prints |= {f"sae.{number}.{file.name}": sha256(file) for file in files}
    prints["text.plan.latencies"] = sha256(recipe.plan.latencies) if recipe.plan.latencies else None
    prints["code.version"] = __version__
    return prints


def settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe's part of the fingerprints. Where a file of behaviors or an SAE lies is free, what is in it is not."""
    prints: dict[str, Any] = {f"recipe.{key}": value for key, value in recipe.flatten().items()}
    prints["recipe.behaviors"] = [b.model_dump(mode="json", exclude={"file"}) for b in recipe.behaviors]
    prints["recipe.features"] = [f.model_dump(mode="json", exclude={"sae"}) for f in recipe.features]
    return prints


def digest_checkpoint(folder: Path) -> dict[str, str]:
    """A digest for every weight file, config.json and the tokenizer's files of a checkpoint."""
    weights = sorted({header.file for header in read_headers(folder, packed_ok=True).tensors.values()})
    whole = sum(file.stat().st_size for file in weights) <= WHOLE
    digests = {file.name: sha256(file) if whole else digest_pieces(file) for file in weights}
    small = ("config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt")
    return digests | {name: sha256(folder / name) for name in small if (folder / name).is_file()}


def digest_pieces(file: Path) -> str:
    """A digest of a large safetensors file from its size, its header and evenly spaced pieces."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        length = stream.read(8)
        digest.update(stream.read(struct.unpack("<Q", length)[0]))
        for piece in range(_PIECES):
            stream.seek(max(0, size - _PIECE) * piece // (_PIECES - 1))
            digest.update(stream.read(_PIECE))
    return "pieces:" + digest.hexdigest()


def refuse_changes(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises CircuitpressError that names every field in which `new` differs from the run folder's `old`."""
    # A key that the recipe did not have when the folder was made had its default.
    old = {f"recipe.{key}": value for key, value in Recipe(model="any").flatten().items()} | dict(old)
    free = list(_FREE)
    if any(old.get(key) != new.get(key) for key in {*old, *new} if key.startswith("weights.")):
        free.remove("recipe.model")
    changes = [line.removeprefix("recipe.") for line in describe_changes(old, new, ignore=free)]
    if not changes:
        return
    lines = [line if not _is_digest(line) else line.partition(":")[0] + ": the content changed" for line in changes]
    raise CircuitpressError(
        f"{path} holds a run with other inputs:\n  " + "\n  ".join(lines),
        hint="take the inputs back, pass another --out, or --restart to throw that run away"
        + (f";\n       for another budget only: circuitpress plan {path} --budget ..." if _only_plan(changes) else ""),
    )


def _is_digest(line: str) -> bool:
    return line.startswith(("weights.", "text.", "sae."))


def _only_plan(changes: list[str]) -> bool:
    return all(line.startswith(("plan.budget:", "plan.protect:")) for line in changes)
