"""The GPTQ file layout, which GPTQModel and optimum share: codes packed into int32 as one little-endian bit stream.

`qweight` int32 [cols * bits / 32, rows] runs along the inputs, `qzeros` int32 [groups, rows * bits / 32] along the
outputs, `scales` float16 [groups, rows], `g_idx` int32 [cols] names each input's group. Version 1 of the layout stores
zero points minus one.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .protocol import Kept, affine_bytes


def unpack(words: Tensor, bits: int) -> Tensor:
    """Codes int64 [n * 32 / bits, m] from int32 [n, m], each column a bit stream of its own."""
    n, m = words.shape
    stream = (words.long()[:, None, :] >> torch.arange(32)[None, :, None]) & 1
    fields = stream.reshape(n * 32 // bits, bits, m)
    return (fields << torch.arange(bits)[None, :, None]).sum(1)


@torch.no_grad()
def refuse_another_map(name: str, linear: Callable[[Tensor], Tensor], kept: Kept) -> None:
    """ValueError if `kept` is not what the peer's own layer computes: then the layout was read wrong.

    The layer may compute in 16 bits; zero points that are off by one change weights by a third and more.
    """
    computed = linear(torch.eye(kept.weight.shape[1])).T.float()
    difference = float((computed - kept.weight).norm() / computed.norm())
    if not difference < 0.02:
        raise ValueError(f"{name}: decoded weights differ by {difference:.0%} from those that the layer computes with")


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
