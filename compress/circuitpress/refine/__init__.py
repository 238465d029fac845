"""Refinement of a rounded model: codes, scales and norms learned together against the original's predictions."""

from .continuations import continuations
from .distill import Hold, Lesson, Rates, Refined, memory, packed_numel, refine
from .write import RECORD, write_refined

__all__ = [
    "RECORD",
    "Hold",
    "Lesson",
    "Rates",
    "Refined",
    "continuations",
    "memory",
    "packed_numel",
    "refine",
    "write_refined",
]
