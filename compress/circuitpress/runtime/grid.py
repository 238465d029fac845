"""One 4-bit grid for a whole matrix, whatever its parts: what the int4 kernels of CPU and GPU take.

Codes of 2 and 3 bits fit into 4 bits as they are; parts may differ in bits as long as they share one group size and
their groups line up with the matrix's. Kernels with 2- and 3-bit storage would read fewer bytes; torch has none on CPU.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..formats import IntCodes, IntFormat
from .descriptor import Descriptor


def int4_group_size(descriptor: Descriptor) -> int | None:
    """The group size that all parts share, None if a part has other than 2 to 4 bits or groups that do not line up."""
    formats = [part.format for part in descriptor.parts]
    sizes = {entry.group_size if isinstance(entry, IntFormat) and entry.bits <= 4 else None for entry in formats}
    size = sizes.pop()
    if sizes or size is None:
        return None
    if descriptor.axis == "cols" and any(part.start % size for part in descriptor.parts):
        return None
    return size


def int4_codes(descriptor: Descriptor, tensors: Mapping[str, Tensor], group_size: int) -> IntCodes:
    """The matrix as codes below 16: uint8 [rows, cols], scales and zeros [rows, ceil(cols / group_size)]."""
    device = next(iter(tensors.values())).device
    groups = -(-descriptor.cols // group_size)
    codes = torch.empty(descriptor.rows, descriptor.cols, dtype=torch.uint8, device=device)
    scales = torch.empty(descriptor.rows, groups, dtype=torch.float16, device=device)
    zeros = torch.empty(descriptor.rows, groups, dtype=torch.uint8, device=device)
    for block in descriptor.blocks(tensors):
        first = block.cols.start // group_size
        span = slice(first, first + block.value.scales.shape[1])
        codes[block.rows, block.cols] = block.value.codes
        scales[block.rows, span] = block.value.scales
        zeros[block.rows, span] = block.value.zeros
    return IntCodes(codes, scales, zeros)
