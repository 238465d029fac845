"""What compression changed inside a model (two models), and whether new text is like the old (a model and a record)."""

from .drift import Drift, HeadDrift, LayerDrift, drift
from .heads import HeadChange, lost_heads
from .monitor import Monitor, fit_monitor, load_monitor, save_monitor, surprise
from .survival import Survival, survival

__all__ = [
    "Drift",
    "HeadChange",
    "HeadDrift",
    "LayerDrift",
    "Monitor",
    "Survival",
    "drift",
    "fit_monitor",
    "load_monitor",
    "lost_heads",
    "save_monitor",
    "surprise",
    "survival",
]
