"""The specification of trellis decoding against Python integers, and what its values must be like."""

import pytest
import torch

from circuitpress_kernels.trellis import MIX, SPREAD, trellis_states, trellis_table, trellis_values


@pytest.mark.parametrize(
    ("memory", "code_bits", "steps"), [(10, 2, 5), (12, 3, 4), (13, 5, 7), (16, 7, 3), (12, 4, 64)]
)
def test_states_are_windows_of_the_ring(memory: int, code_bits: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(memory)
    codes = torch.randint(2**code_bits, (3, steps), generator=generator, dtype=torch.uint8)
    states = trellis_states(codes, code_bits=code_bits, memory=memory)
    size = steps * code_bits
    for row, found in zip(codes.tolist(), states.tolist(), strict=True):
        ring = sum(code << (code_bits * t) for t, code in enumerate(row))
        for t, state in enumerate(found):
            turned = (ring >> (code_bits * t)) | (ring << (size - code_bits * t))
            assert state == turned % 2**memory


@pytest.mark.parametrize("width", [1, 2])
def test_values_are_sums_of_bytes(width: int) -> None:
    table = trellis_table(16, width)
    for state in (0, 1, 4095, 65_535):
        for place, (factor, summand) in enumerate(MIX[:width]):
            mixed = (factor * state + summand) % 2**32
            assert float(table[state, place]) == sum(mixed.to_bytes(4, "little")) - 510
    codes = torch.tensor([[3, 1, 2, 0, 3, 3, 1, 0]], dtype=torch.uint8)
    states = trellis_states(codes, code_bits=2, memory=16)
    values = trellis_values(codes, code_bits=2, memory=16, width=width)
    assert torch.equal(values, table[states].flatten(1))


@pytest.mark.parametrize("memory", [10, 12, 13, 16])
def test_values_are_nearly_gaussian_and_pairs_uncorrelated(memory: int) -> None:
    table = trellis_table(memory, 2).double() / SPREAD
    assert torch.equal(table[:, :1], trellis_table(memory, 1).double() / SPREAD)
    assert torch.allclose(table.mean(0), torch.zeros(2, dtype=torch.float64), atol=3 * 2 ** (-memory / 2))
    assert torch.allclose(table.var(0), torch.ones(2, dtype=torch.float64), atol=3 * (2 / 2**memory) ** 0.5)
    assert abs(float((table[:, 0] * table[:, 1]).mean())) < 0.05
    beyond = float((table.abs() > 2).double().mean())
    assert beyond == pytest.approx(0.0455, abs=0.01)
    assert torch.equal(table.mul(SPREAD).half().double(), table.mul(SPREAD).round())
