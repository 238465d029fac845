"""Rounding: from a weight matrix and the Hessian of its inputs to codes.

`grid` fits affine grids to groups of weights, `feedback` rounds column by column (GPTQ), `polish` improves what was
rounded, `codebook` learns the values that codes stand for, `outliers` chooses the weights that stay in float16,
`trellis` codes rotated weights, `matrix` assembles segments of several formats into one matrix.
"""

from .feedback import Rounding, gptq
from .matrix import Quantized, quantize_everywhere, quantize_matrix

__all__ = ["Quantized", "Rounding", "gptq", "quantize_everywhere", "quantize_matrix"]
