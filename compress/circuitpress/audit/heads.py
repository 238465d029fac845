"""Heads that lost their pattern: previous-token, induction, duplicate-token and sink heads of the reference.

A head has a pattern if its score on repeated random tokens (mech/lens/attention.py) is at least `HAS`; it lost it if
the other model's head of the same place scores less than half of that. Correlational: a pattern is not a function, so
what a lost head means is for the behaviors to say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..mech.lens.attention import HeadScores

Pattern = Literal["previous_token", "induction", "duplicate", "first_position"]
PATTERNS: tuple[Pattern, ...] = ("previous_token", "induction", "duplicate", "first_position")
HAS = 0.4
"""Attention to the position that makes the pattern; a head that attends evenly has 1 / length."""
LOST = 0.5
"""Share of its score below which a head has lost its pattern."""


@dataclass(frozen=True)
class HeadChange:
    """A head of the reference with a pattern, its score before and after, and whether it is lost."""

    layer: int
    head: int
    pattern: Pattern
    before: float
    after: float
    lost: bool


def lost_heads(reference: Sequence[HeadScores], model: Sequence[HeadScores]) -> list[HeadChange]:
    """Every pattern of every head of `reference` beside the same head of `model`, strongest first.

    ValueError if the two lists are not of the same heads.
    """
    if [(s.layer, s.head) for s in reference] != [(s.layer, s.head) for s in model]:
        raise ValueError("the two models have other heads")
    found = []
    for before, after in zip(reference, model, strict=True):
        for pattern in PATTERNS:
            was, is_now = getattr(before, pattern), getattr(after, pattern)
            if was >= HAS:
                found.append(HeadChange(before.layer, before.head, pattern, was, is_now, is_now < LOST * was))
    return sorted(found, key=lambda change: -change.before)
