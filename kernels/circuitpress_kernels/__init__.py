"""Kernels for packed weights, each beside the plain torch code that specifies it. Needs torch; Triton only on a GPU."""

from .layout import Part, join_rows, lay_out
from .product import has_triton, slice_linear
from .slices import BOOK, DENSE, TILE_ROWS, TRELLIS, SliceForm, SliceMatrix, slice_linear_twin, slice_weight

__all__ = [
    "BOOK",
    "DENSE",
    "Part",
    "TILE_ROWS",
    "TRELLIS",
    "SliceForm",
    "SliceMatrix",
    "has_triton",
    "join_rows",
    "lay_out",
    "slice_linear",
    "slice_linear_twin",
    "slice_weight",
]
