"""`check MODEL --behaviors FILE`: which behaviors of a file the model can do at all."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoint import resolve_checkpoint
from ..console import Console, table
from ..errors import CheckpointError
from .session import choose_device, load_tokenizer


def check_behaviors(
    model: str, file: Path, console: Console, *, device: str | None = None
) -> tuple[str, dict[str, Any]]:
    """Runs the prompts of every behavior in `file` through the model; returns a table and its document.

    Works on packed models as well. Raises RecipeError for a faulty file, CheckpointError where the tokenizer's ids are
    beyond the model's vocabulary.
    """
    from ..behaviors import Behavior, load_behaviors
    from ..score.ability import ability
    from ..score.metrics import rows_of
    from ..stream import open_stream

    folder = resolve_checkpoint(model)
    unfit: dict[str, str] = {}
    behaviors = load_behaviors(file, load_tokenizer(folder), unfit=unfit)
    stream = open_stream(folder, device=choose_device(device or "auto"))

    def checked(behavior: Behavior) -> Behavior:
        largest, length = int(rows_of(behavior).max()), rows_of(behavior).shape[1]
        if largest >= stream.anatomy.vocab:
            hint = "the checkpoint has the tokenizer files of another model: copy the right ones into its folder"
            raise CheckpointError(
                f"{behavior.name}: the tokenizer yields id {largest}, beyond the vocabulary", hint=hint
            )
        if stream.anatomy.context and length > stream.anatomy.context:
            hint = "shorten its prompts, or leave the behavior out"
            raise CheckpointError(
                f"{behavior.name}: prompts of {length} tokens, the model reads {stream.anatomy.context}", hint=hint
            )
        return behavior

    with console.progress("check", stream.depth * len(behaviors)) as advance:
        found = [ability(stream, checked(behavior), advance=advance) for behavior in behaviors]
    rows = [("behavior", "pairs", "accuracy", "metric", "mean", "+-", "chance", "can do")]
    for entry in found:
        rows.append(
            (
                entry.name, str(entry.pairs), f"{entry.accuracy:.2f}", entry.metric, f"{entry.mean:.2f}",
                f"{entry.stderr:.2f}", f"{entry.p_value:.0e}", "yes" if entry.is_able else "no",
            )
        )  # fmt: skip
    able = sum(entry.is_able for entry in found)
    text = table(f"{folder.name}: can do {able} of {len(found)} behaviors", rows)
    text += "".join(f"\nleft out: {name}: {reason}" for name, reason in unfit.items())
    document = {
        "model": str(folder),
        "behaviors": [asdict(entry) | {"able": entry.is_able} for entry in found],
        "unfit": unfit,
    }
    return text, document
