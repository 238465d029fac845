"""Bit packing against numpy's unpackbits, one bit at a time."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from circuitpress.formats.base import pack_bits, packed_size, unpack_bits


def reference(codes: Tensor, bits: int) -> bytes:
    """Every code's bits, the lowest first, in one little-endian stream that is padded with zeros to whole bytes."""
    single = np.unpackbits(codes.numpy().reshape(-1, 1), axis=1, bitorder="little")[:, :bits]
    return np.packbits(single.reshape(-1), bitorder="little").tobytes()


@settings(deadline=None, max_examples=200)
@given(bits=st.integers(2, 8), count=st.integers(1, 131), seed=st.integers(0, 2**31))
def test_the_stream_is_the_codes_bit_by_bit(bits: int, count: int, seed: int) -> None:
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, count, dtype=np.uint8))
    stream = pack_bits(codes, bits)
    assert stream.dtype == torch.uint8
    assert stream.numpy().tobytes() == reference(codes, bits)
    assert len(stream) == packed_size(count, bits) == -(-count * bits // 8)
    assert torch.equal(unpack_bits(stream, bits, (count,)), codes)


@settings(deadline=None, max_examples=50)
@given(bits=st.integers(2, 8), rows=st.integers(1, 9), cols=st.integers(1, 23))
def test_matrices_are_packed_row_after_row(bits: int, rows: int, cols: int) -> None:
    generator = torch.Generator().manual_seed(rows * 31 + cols)
    codes = torch.randint(2**bits, (rows, cols), generator=generator, dtype=torch.uint8)
    assert torch.equal(unpack_bits(pack_bits(codes.T.contiguous().T, bits), bits, (rows, cols)), codes)
    assert pack_bits(codes, bits).numpy().tobytes() == reference(codes.reshape(-1), bits)


def test_what_is_packed_is_a_copy() -> None:
    """Eight bits are the codes themselves: later changes must not reach the packed tensor."""
    codes = torch.arange(5, dtype=torch.uint8)
    packed = pack_bits(codes, 8)
    codes[0] = 99
    assert packed[0] == 0
