"""Side by side with other compressors: the same checkpoint, the same calibration tokens, one judge, real bytes.

`compare` is the whole of it; `peers` says what an adapter of somebody else's compressor is.
"""

from .environments import peers_folder
from .methods import PEERS, settings
from .plot import draw
from .quality import Comparison, compare, compare_from_options
from .table import budgets_of, cells, render

__all__ = [
    "PEERS",
    "Comparison",
    "budgets_of",
    "cells",
    "compare",
    "compare_from_options",
    "draw",
    "peers_folder",
    "render",
    "settings",
]
