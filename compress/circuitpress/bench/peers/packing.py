"""The GPTQ file layout, which GPTQModel and optimum share: codes packed into int32 as one little-endian bit stream.

`qweight` int32 [cols * bits / 32, rows] runs along the inputs, `qzeros` int32 [groups, rows * bits / 32] along the
outputs, `scales` float16 [groups, rows], `g_idx` int32 [cols] names each input's group. Version 1 of the layout stores
zero points minus one.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .protocol import Kept, affine_bytes


def unpack(words: Tensor, bits: int) -> Tensor:
    """Codes int64 [n * 32 / bits, m] from int32 [n, m], each column a bit stream of its own."""
    n, m = words.shape
    stream = (words.long()[:, None, :] >> torch.arange(32)[None, :, None]) & 1
    fields = stream.reshape(n * 32 // bits, bits, m)
    return (fields << torch.arange(bits)[None, :, None]).sum(1)


def decode(tensors: Mapping[str, Tensor], bits: int, *, minus_one: bool, reordered: bool) -> Kept:
    """One matrix of the layout. The group index counts only if columns were `reordered` (desc_act)."""
    codes = unpack(tensors["qweight"], bits)
    scales, index = tensors["scales"].float(), tensors["g_idx"].long()
    cols, rows = codes.shape
    zeros = unpack(tensors["qzeros"].T.contiguous(), bits).T[: scales.shape[0], :rows]
    if minus_one:
        zeros = (zeros + 1) % 2**bits
    weight = (codes - zeros[index]).float() * scales[index]
    nbytes = affine_bytes(rows, cols, bits, -(-cols // scales.shape[0]), zero_bits=bits)
    return Kept(weight.T.contiguous(), nbytes + (4 * cols if reordered else 0))
