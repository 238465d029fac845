"""Evaluation: how far a compressed model is from its reference."""

from .divergence import Divergence, Tally
from .fidelity import Fidelity, fidelity

__all__ = ["Divergence", "Fidelity", "Tally", "fidelity"]
