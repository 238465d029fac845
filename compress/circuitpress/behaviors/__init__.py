"""Behaviors: prompts with a metric, read from files or generated for the tokenizer at hand."""

from .build import Contrast, Minimal, Unfit, build_pairs, build_sentences, build_texts
from .generate import GENERATORS, generate
from .load import load_behaviors
from .safety import safety_set
from .types import Behavior, Metric, Pairs, Sentences

__all__ = [
    "GENERATORS",
    "Behavior",
    "Contrast",
    "Metric",
    "Minimal",
    "Pairs",
    "Sentences",
    "Unfit",
    "build_pairs",
    "build_sentences",
    "build_texts",
    "generate",
    "load_behaviors",
    "safety_set",
]
