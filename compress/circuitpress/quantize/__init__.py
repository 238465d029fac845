"""Rounding: from a weight matrix and the Hessian of its inputs to codes.

`grid` fits affine grids to groups of weights, `feedback` rounds column by column (GPTQ), `matrix` assembles
segments of several formats into one matrix.
"""

from .feedback import Rounding, gptq
from .matrix import Quantized, quantize_everywhere, quantize_matrix

__all__ = ["Quantized", "Rounding", "gptq", "quantize_everywhere", "quantize_matrix"]
