"""Circuits: the heads, MLPs and edges that do a behavior, found by gradients and ablation and verified by ablation.

`find_circuit` proposes and measures, `verify_circuit` tests the claim, `draw_circuit` shows it. The engine is
`patch.run_patched`: exact patching of any set of edges.
"""

from .circuit import Circuit
from .draw import draw_circuit, save_drawing
from .find import Settings, find_circuit
from .graph import Graph, graph_of
from .verify import Standing, Verification, stand, verify_circuit

__all__ = [
    "Circuit",
    "Graph",
    "Settings",
    "Standing",
    "Verification",
    "draw_circuit",
    "find_circuit",
    "graph_of",
    "save_drawing",
    "stand",
    "verify_circuit",
]
