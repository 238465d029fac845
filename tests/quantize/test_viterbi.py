"""The trellis encoder against exhaustive search, against a plain Viterbi for every seam, and its error on noise."""

from itertools import product

import pytest
import torch
from torch import Tensor

from circuitpress.quantize import viterbi
from circuitpress.quantize.viterbi import encode
from circuitpress_kernels.trellis import SPREAD, trellis_states, trellis_table


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decode(codes: Tensor, table: Tensor, code_bits: int) -> Tensor:
    memory = len(table).bit_length() - 1
    return table[trellis_states(codes, code_bits=code_bits, memory=memory)].flatten(1)


def every_ring(steps: int, code_bits: int) -> Tensor:
    """All codes of a ring, uint8 [2^(steps * code_bits), steps]."""
    return torch.tensor(list(product(range(2**code_bits), repeat=steps)), dtype=torch.uint8)


def exact(x: Tensor, table: Tensor, code_bits: int, weights: Tensor) -> float:
    """The least error of one sequence [T]: a plain Viterbi search in float64 for every state of the seam."""
    states, width = table.shape
    buckets, branches = states >> code_bits, 2**code_bits
    state = torch.arange(states)
    best = torch.inf
    for seam in range(buckets):
        cost = torch.full((buckets,), torch.inf, dtype=torch.float64)
        cost[seam] = 0
        for step, w in zip(x.double().view(-1, width), weights.double().view(-1, width), strict=True):
            total = cost[state % buckets] + ((step - table.double()).square() * w).sum(1)
            cost = total.view(buckets, branches).amin(1)
        best = min(best, float(cost[seam]))
    return best


@pytest.mark.parametrize(
    ("memory", "code_bits", "width", "steps"), [(3, 1, 1, 9), (4, 2, 1, 6), (4, 2, 1, 2), (5, 3, 2, 3), (3, 2, 1, 5)]
)
def test_no_ring_is_better(memory: int, code_bits: int, width: int, steps: int) -> None:
    """A single pass over the ring can miss the best seam, but rarely and by little."""
    table = normal(2**memory, width, seed=memory)
    x = normal(40, steps * width, seed=steps)
    weights = normal(40, steps * width, seed=2).abs()
    choices = decode(every_ring(steps, code_bits), table, code_bits)
    errors = (weights[:, None] * (x[:, None] - choices[None]).square()).sum(2)
    codes = encode(x, table, code_bits=code_bits, weights=weights)
    found = (weights * (x - decode(codes, table, code_bits)).square()).sum(1)
    best = errors.amin(1)
    assert torch.allclose(torch.tensor([exact(a, table, code_bits, b) for a, b in zip(x, weights, strict=True)]), best)
    assert (found >= best - 1e-5).all()
    assert (found <= best + 1e-5).float().mean() >= 0.5
    assert float(found.sum() / best.sum()) < 1.25


def test_given_its_seam_the_path_is_the_best() -> None:
    """What both passes rest on: with the ends held, no cheaper path exists (float64, every ring)."""
    table = normal(16, 1, seed=1)
    x = normal(7, 6, seed=3)
    rings = every_ring(6, 2)
    states = trellis_states(rings, code_bits=2, memory=4)
    errors = (x[:, None] - table[states].flatten(1)[None]).square().sum(2)
    codes = encode(x, table, code_bits=2)
    own = trellis_states(codes, code_bits=2, memory=4)
    found = (x - decode(codes, table, 2)).square().sum(1)
    for i in range(7):
        same_seam = states[:, 0] % 4 == own[i, 0] % 4
        assert float(found[i]) == pytest.approx(float(errors[i][same_seam].min()), abs=1e-5)


@pytest.mark.parametrize("length", [128, 200])
def test_long_rings_are_close_to_the_best(length: int) -> None:
    table = trellis_table(6, 1) / SPREAD
    x = normal(4, length, seed=7)
    codes = encode(x, table, code_bits=2)
    found = (x - decode(codes, table, 2)).square().sum(1)
    best = torch.tensor([exact(row, table, 2, torch.ones(length)) for row in x])
    assert (found >= best - 1e-3).all()
    assert float(found.sum() / best.sum()) < 1.01


@pytest.mark.parametrize(
    ("memory", "code_bits", "width", "error"),
    [(10, 2, 1, 0.0776), (10, 3, 1, 0.0215), (12, 2, 1, 0.0727), (12, 3, 1, 0.0194), (12, 4, 1, 0.0055)],
)
def test_error_on_gaussian_noise(memory: int, code_bits: int, width: int, error: float) -> None:
    """Within 3 % of what an independent implementation measured with codes of the same kind."""
    table = trellis_table(memory, width) / SPREAD
    x = normal(64, 256, seed=9)
    codes = encode(x, table, code_bits=code_bits)
    relative = (x - decode(codes, table, code_bits)).square().mean() / x.square().mean()
    assert float(relative) == pytest.approx(error, rel=0.03)


def test_half_steps_lie_between_whole_ones() -> None:
    table = trellis_table(10, 2) / SPREAD
    x = normal(32, 256, seed=9)
    error = float((x - decode(encode(x, table, code_bits=5), table, 5)).square().mean())
    assert 0.0215 < error < 0.05


def test_chunks_lanes_and_neighbours_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    table = trellis_table(8, 1) / SPREAD
    x = normal(70, 64, seed=4)
    whole = encode(x, table, code_bits=2)
    assert torch.equal(encode(x[13:14], table, code_bits=2), whole[13:14])
    monkeypatch.setattr(viterbi, "_KEPT", 1)
    monkeypatch.setattr(viterbi, "_CACHE", 1 << 12)
    assert torch.equal(encode(x, table, code_bits=2), whole)


def test_values_without_weight_are_free() -> None:
    table = trellis_table(8, 1) / SPREAD
    x = normal(3, 64, seed=5)
    weights = torch.ones(64)
    weights[40:] = 0
    codes = encode(x, table, code_bits=2, weights=weights)
    changed = x.clone()
    changed[:, 40:] = 100.0
    assert torch.equal(encode(changed, table, code_bits=2, weights=weights), codes)
    plain = (x - decode(encode(x, table, code_bits=2), table, 2)).square()[:, :40].sum()
    assert (x - decode(codes, table, 2)).square()[:, :40].sum() < plain


@pytest.mark.parametrize(("length", "width"), [(5, 1), (7, 2)])
def test_a_ring_shorter_than_a_state_is_refused(length: int, width: int) -> None:
    table = trellis_table(12, width)
    with pytest.raises(ValueError, match=f"a sequence of {length} values has no ring of 2-bit codes"):
        encode(torch.zeros(1, length), table, code_bits=2)
