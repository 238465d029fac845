"""What a storage format is: bytes, pack, unpack, decode.

A segment (a run of rows or columns of one matrix) is stored in one format as a few flat tensors. `layout` names them
and counts their elements from the shape alone, so bytes are known before anything is quantized and the flat tensors of
several segments can be laid end to end. Rounding is not a format's business (see `quantize/`): a format receives codes
that were already chosen. `decode` is the specification that every kernel must match.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor


class Format(ABC):
    """One way to store the weights of a segment [rows, cols]."""

    name: str
    """The name in recipes, plans and checkpoints, such as `int4g64` or `bfloat16`."""

    @abstractmethod
    def layout(self, rows: int, cols: int) -> dict[str, tuple[torch.dtype, int]]:
        """The flat tensors of a segment of this shape: name -> (dtype, number of elements)."""

    @abstractmethod
    def pack(self, value: Any) -> dict[str, Tensor]:
        """The flat tensors of one quantized segment, as `layout` describes them."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], rows: int, cols: int) -> Any:
        """The inverse of `pack`."""

    @abstractmethod
    def decode(self, value: Any) -> Tensor:
        """The weights [rows, cols] that the model computes with, in float32."""

    def nbytes(self, rows: int, cols: int) -> int:
        """Stored bytes of a segment [rows, cols], scales, zeros and indices included."""
        return sum(dtype.itemsize * count for dtype, count in self.layout(rows, cols).values())


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Packs uint8 codes below 2**bits into bytes [ceil(n * bits / 8)], little-endian and without gaps.

    Code i occupies bits i*bits to (i+1)*bits - 1 of the stream, so eight codes always fill `bits` bytes.
    """
    flat = codes.reshape(-1)
    if bits == 8:
        return flat.clone()
    count = flat.numel()
    eights = torch.nn.functional.pad(flat, (0, -count % 8)).view(-1, 8).long()
    word = (eights << (bits * torch.arange(8, device=flat.device))).sum(1)
    stream = (word[:, None] >> (8 * torch.arange(bits, device=flat.device))) & 0xFF
    return stream.to(torch.uint8).reshape(-1)[: packed_size(count, bits)].clone()


def unpack_bits(stream: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack_bits`: uint8 codes of `shape`."""
    count = prod(shape)
    if bits == 8:
        return stream[:count].reshape(shape)
    padded = torch.nn.functional.pad(stream, (0, -stream.numel() % bits)).view(-1, bits).long()
    word = (padded << (8 * torch.arange(bits, device=stream.device))).sum(1)
    codes = (word[:, None] >> (bits * torch.arange(8, device=stream.device))) & (2**bits - 1)
    return codes.to(torch.uint8).reshape(-1)[:count].reshape(shape)


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8
