"""Budgets as a user writes them: `3.0bpw`, `40%`, `900MB`; `12ms@batch1` is a time and leaves bytes free (latency.py).

The first three become one number, the most bytes that the linear weights of the decoder blocks may take. Arithmetic is
exact (fractions, then floor), so a plan that uses every byte of its budget is never one byte above it.
"""

from dataclasses import dataclass
from fractions import Fraction

from ..errors import RecipeError
from ..fields import BUDGET

_BYTES = {
    "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
}  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """How much a compressed model may take: `value` in `unit` (bpw, %, bytes, time); `text` is what was written."""

    text: str
    value: Fraction
    unit: str

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Reads `3.0bpw`, `40%`, `900MB`, `1.2GB` or `800MiB`; RecipeError for anything else and for zero."""
        match = BUDGET.fullmatch(text.strip())
        if match is None or Fraction(match[1]) <= 0:
            raise RecipeError(
                [f"plan.budget: {text!r} is not a budget"],
                hint="write bits per weight (3.0bpw), percent of the 16-bit linear weights (40%), bytes of all weight "
                "files (900MB, 1.2GB) or a time (12ms@batch1), above zero",
            )
        return cls(text.strip(), Fraction(match[1]), match[2])

    @property
    def counts_files(self) -> bool:
        """Whether the budget is for all weight files, embeddings included, and not for the linear weights alone."""
        return self.unit in _BYTES

    def linear_bytes(self, linear_numel: int, other_bytes: int) -> int:
        """The most bytes that `linear_numel` linear weights may take; negative if `other_bytes` alone exceed it.

        `bpw` counts bits of the linear weights, `%` is of those weights at 16 bits, and a budget in bytes is for all
        weight files: `other_bytes` (embeddings, norms, lm_head, file headers) are taken off.
        """
        if self.unit == "bpw":
            return int(self.value * linear_numel / 8)
        if self.unit == "%":
            return int(self.value * 2 * linear_numel / 100)
        if "@" in self.unit:  # a time: as many bytes as there are in float32
            return 4 * linear_numel
        return int(self.value * _BYTES[self.unit]) - other_bytes
