"""A behavior that a tiny model of random weights has: after anything it prefers one word to another."""

import json
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from circuitpress.behaviors import load_behaviors
from circuitpress.score.ability import behavior_values
from circuitpress.stream import open_stream


def write_likes(path: Path, model: Path, text: str, *, words: tuple[str, str], pairs: int, length: int) -> None:
    """Writes `pairs` minimal pairs of sentences of `length` words to a .jsonl, of which `model` prefers the good one.

    They end in one of the two `words`, the one that it prefers most often; seeded.
    """
    draw, known = np.random.default_rng(length), text.split()
    starts = [" ".join(draw.choice(known, length - 1)) for _ in range(8 * pairs)]
    rows = [dict(zip(("good", "bad"), (f"{start} {word}" for word in words), strict=True)) for start in starts]
    path.write_text("\n".join(map(json.dumps, rows)))
    (behavior,) = load_behaviors(path, AutoTokenizer.from_pretrained(model))
    _, margins = behavior_values(open_stream(model), behavior)
    turn = (margins > 0).mean() < 0.5
    chosen = [row for row, margin in zip(rows, -margins if turn else margins, strict=True) if margin > 0][:pairs]
    if turn:
        chosen = [{"good": row["bad"], "bad": row["good"]} for row in chosen]
    assert len(chosen) == pairs
    path.write_text("\n".join(map(json.dumps, chosen)))
