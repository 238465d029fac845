"""Kernels for packed weights, each beside the plain torch code that specifies it. Needs torch; Triton only on a GPU."""

from .int4 import GROUP_SIZES, MAX_BATCH, TILE_ROWS, Int4Tiles, int4_linear, int4_linear_twin, int4_tiles, int4_weight

__all__ = [
    "GROUP_SIZES",
    "MAX_BATCH",
    "TILE_ROWS",
    "Int4Tiles",
    "int4_linear",
    "int4_linear_twin",
    "int4_tiles",
    "int4_weight",
]
