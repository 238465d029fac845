"""KL, perplexity and agreement against float64 loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from circuitpress.evaluate import Tally
from circuitpress.evaluate.divergence import next_tokens


def logits(n: int, length: int, vocab: int, seed: int) -> Tensor:
    return 3 * torch.randn(n, length, vocab, generator=torch.Generator().manual_seed(seed))


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = top + math.log(sum(math.exp(value - top) for value in row))
    return [value - total for value in row]


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 5), length=st.integers(2, 7), vocab=st.integers(2, 19), seed=st.integers(0, 1000))
def test_against_loops(n: int, length: int, vocab: int, seed: int) -> None:
    reference, changed = logits(n, length, vocab, seed), logits(n, length, vocab, seed + 1)
    ids = torch.randint(vocab, (n, length), generator=torch.Generator().manual_seed(seed))
    tally = Tally()
    for p, q, labels in zip(reference, changed, next_tokens(ids), strict=True):
        tally.add(p, q, labels)
    result = tally.result(1)
    per_window, agree, losses, reference_losses = [], 0, [], []
    for w in range(n):
        kl = 0.0
        for t in range(length):
            p, q = (log_softmax(x[w, t].double().tolist()) for x in (reference, changed))
            kl += sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
            agree += p.index(max(p)) == q.index(max(q))
            if t + 1 < length:
                label = int(ids[w, t + 1])
                losses.append(-q[label])
                reference_losses.append(-p[label])
        per_window.append(kl / length)
    mean = sum(per_window) / n
    # Softmax in float32, sums in float64.
    assert result.kl == pytest.approx(mean, rel=1e-5, abs=1e-7)
    assert result.top1_agreement == agree / (n * length)
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert result.reference_perplexity == pytest.approx(math.exp(sum(reference_losses) / len(losses)), rel=1e-5)
    assert result.tokens == n * length
    if n == 1:
        assert result.kl_stderr == math.inf
    else:
        spread = sum((value - mean) ** 2 for value in per_window) / (n - 1)
        assert result.kl_stderr == pytest.approx(math.sqrt(spread / n), rel=1e-4, abs=1e-7)


def test_a_model_does_not_differ_from_itself() -> None:
    same = logits(2, 5, 11, 0)
    tally = Tally()
    for rows in same:
        tally.add(rows, rows.clone(), None)
    result = tally.result(1)
    assert (result.kl, result.kl_stderr, result.top1_agreement) == (0.0, 0.0, 1.0)
    assert math.isnan(result.perplexity)  # no labels, no perplexity


def test_a_shift_of_the_logits_is_no_difference() -> None:
    rows = logits(1, 5, 11, 0)[0]
    result = Tally().add(rows, rows + 7.5, None).result(1)
    assert abs(result.kl) < 1e-6
    assert result.top1_agreement == 1.0


def test_pieces_of_a_window_make_up_one_window() -> None:
    """The standard error is over windows, however many pieces they are computed in."""
    reference, changed = logits(3, 8, 13, 0), logits(3, 8, 13, 1)
    whole, pieces = Tally(), Tally()
    for p, q in zip(reference, changed, strict=True):
        whole.add(p, q, None)
        for span in (slice(0, 3), slice(3, 6), slice(6, 8)):
            pieces.add(p[span], q[span], None)
    a, b = whole.result(1), pieces.result(3)
    assert b.kl == pytest.approx(a.kl, rel=1e-6)
    assert b.kl_stderr == pytest.approx(a.kl_stderr, rel=1e-5)
    assert b.tokens == a.tokens == 24


def test_next_tokens() -> None:
    assert next_tokens(torch.tensor([[4, 5, 6], [7, 8, 9]])).tolist() == [[5, 6, -1], [8, 9, -1]]


def test_a_ruined_model_has_a_finite_kl_and_an_infinite_perplexity() -> None:
    """Logits of 1e4 on the wrong token: exp overflows, and no warning is raised."""
    reference, changed = torch.zeros(4, 5), torch.zeros(4, 5)
    changed[:, 0] = 1e4
    result = Tally().add(reference, changed, torch.tensor([1, 2, 3, -1])).result(1)
    assert result.perplexity == math.inf
    assert result.kl == pytest.approx(0.8 * 1e4 - math.log(5), rel=1e-5)
