"""Values and gradients of every metric against the whole model in transformers, by autograd in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from circuitpress.behaviors import Behavior, Pairs, Sentences
from circuitpress.score.ability import ability, behavior_values, luck
from circuitpress.score.metrics import (
    answer_logits,
    as_decision,
    fold,
    mask_of,
    metric_gradients,
    metric_values,
    row_values,
    rows_of,
)  # fmt: skip
from circuitpress.store import Store
from circuitpress.stream import Stream, open_stream

from ..whole import load, tokens


def contrasts(metric: Any = "logit_diff", n: int = 5) -> Behavior:
    """Pairs of 4 to 9 tokens, padded to 9."""
    position = torch.tensor([8, 3, 6, 5, 8])[:n]
    pairs = Pairs(tokens(n, 9), tokens(n, 9, seed=1), position, tokens(1, n)[0], tokens(1, n, seed=7)[0])
    return Behavior("pairs", metric, pairs)


def sentences(metric: Any = "sentence") -> Behavior:
    """Three pairs of different lengths."""
    lengths = torch.tensor([7, 5, 8]), torch.tensor([6, 8, 8])
    if metric == "loss":
        lengths = lengths[0], lengths[0]
    pairs = Sentences(tokens(3, 8), tokens(3, 8, seed=2), *lengths, torch.tensor([1, 3, 2]))
    return Behavior("sentences", metric, pairs)


def final_of(stream: Stream, ids: Tensor) -> list[Tensor]:
    """Final hidden states, batch by batch."""
    from circuitpress.stream import forward

    store, batches = Store(None), stream.batches(ids)
    forward(stream, batches, store)
    return [store.get((stream.depth, b)) for b in range(len(batches))]


def by_hand(behavior: Behavior, logits: Tensor, reference: Tensor | None = None) -> Tensor:
    """The metric of every pair from the logits [rows, length, vocab] of all rows."""
    pairs = behavior.pairs
    logp = logits.log_softmax(-1)
    if isinstance(pairs, Pairs):
        n = range(len(pairs))
        if behavior.metric == "loss":
            return torch.stack([logp[i, pairs.position[i], pairs.answer[i]] for i in n])
        if behavior.metric == "kl":
            assert reference is not None
            known = reference.double().log_softmax(-1)
            return torch.stack([-(known[i].exp() * (known[i] - logp[i, pairs.position[i]])).sum() for i in n])
        return torch.stack([
            logits[i, pairs.position[i], pairs.answer[i]] - logits[i, pairs.position[i], pairs.wrong[i]] for i in n
        ])  # fmt: skip

    def summed(row: int, ids: Tensor, stop: Tensor, i: int) -> Tensor:
        return torch.stack([logp[row, t - 1, ids[i, t]] for t in range(int(pairs.start[i]), int(stop[i]))]).sum()

    good = [summed(i, pairs.good, pairs.good_length, i) for i in range(len(pairs))]
    if behavior.metric == "loss":
        return torch.stack(good) / (pairs.good_length - pairs.start)
    return torch.stack([g - summed(i + len(pairs), pairs.bad, pairs.bad_length, i) for i, g in enumerate(good)])


CASES = [*map(contrasts, ("logit_diff", "accuracy", "loss", "kl")), sentences(), sentences("loss")]


@pytest.mark.parametrize("behavior", CASES, ids=lambda b: f"{b.name}-{b.metric}")
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_values_and_gradients(name: str, behavior: Behavior, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    stream = open_stream(folder, batch_tokens=18)
    model, rows = load(folder), rows_of(behavior)
    reference = None
    if behavior.metric == "kl":
        reference = torch.randn(len(behavior), 97, generator=torch.Generator().manual_seed(3))
    states: list[Tensor] = []
    norm = model.model.norm if hasattr(model, "model") else model.transformer.ln_f
    handle = norm.register_forward_pre_hook(lambda _, args: (args[0].retain_grad(), states.append(args[0]))[1])
    expected = by_hand(behavior, model(rows).logits, reference)
    handle.remove()
    expected.sum().backward()
    final = final_of(stream, rows)
    assert len(final) > 1
    values = metric_values(stream, behavior, final, reference=reference)
    assert values.shape == (len(behavior),)
    np.testing.assert_allclose(values, expected.detach().numpy(), rtol=1e-4, atol=1e-4)
    gradient = torch.cat(metric_gradients(stream, behavior, final, reference=reference))
    assert states[0].grad is not None
    torch.testing.assert_close(gradient.double(), states[0].grad, rtol=2e-3, atol=1e-4)
    # Nothing flows into padding.
    assert not gradient[~mask_of(behavior)].any()


def test_answer_logits_and_kl_to_oneself(tiny_llama: Path) -> None:
    stream, behavior = open_stream(tiny_llama, batch_tokens=20), contrasts("kl")
    final = final_of(stream, rows_of(behavior))
    logits = answer_logits(stream, behavior, final)
    whole = load(tiny_llama)(rows_of(behavior)).logits.detach()
    pairs = behavior.pairs
    assert isinstance(pairs, Pairs)
    torch.testing.assert_close(logits.double(), whole[torch.arange(5), pairs.position], rtol=1e-4, atol=1e-4)
    assert np.abs(metric_values(stream, behavior, final, reference=logits)).max() < 1e-6
    with pytest.raises(ValueError, match="compares with a reference model"):
        metric_values(stream, behavior, final)
    with pytest.raises(ValueError, match="no answer position"):
        answer_logits(stream, sentences(), final)


def test_chunks_of_logits_do_not_change_anything(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, behavior = open_stream(tiny_llama), sentences()
    final = final_of(stream, rows_of(behavior))
    values, gradients = metric_values(stream, behavior, final), metric_gradients(stream, behavior, final)
    monkeypatch.setattr("circuitpress.score.metrics.LOGIT_CHUNK", 97 * 4)
    np.testing.assert_allclose(metric_values(stream, behavior, final), values, rtol=1e-6)
    torch.testing.assert_close(torch.cat(metric_gradients(stream, behavior, final)), torch.cat(gradients))


def test_folding_decisions_and_parts() -> None:
    behavior = sentences()
    rows = torch.arange(12.0).view(2, 6)
    assert torch.equal(fold(behavior, rows), rows[:, :3] + rows[:, 3:])
    assert torch.equal(fold(contrasts(), rows[:, :5]), rows[:, :5])
    assert as_decision(contrasts("kl")).metric == "logit_diff"
    assert as_decision(sentences("loss")).metric == "sentence"
    part = behavior.take(torch.tensor([True, False, True])).pairs
    assert isinstance(part, Sentences)
    assert torch.equal(part.good_length, torch.tensor([7, 8]))
    assert len(contrasts().take(torch.tensor([4, 0]))) == 2


@pytest.mark.parametrize("behavior", CASES, ids=lambda b: f"{b.name}-{b.metric}")
def test_ability_is_the_metric_of_one_walk(tiny_llama: Path, behavior: Behavior) -> None:
    stream = open_stream(tiny_llama, batch_tokens=18)
    values, margins = behavior_values(stream, behavior)
    decision = as_decision(behavior)
    expected = by_hand(decision, load(tiny_llama)(rows_of(decision)).logits.detach())
    np.testing.assert_allclose(margins, expected.numpy(), rtol=1e-4, atol=1e-4)
    found = ability(stream, behavior)
    assert found.accuracy == pytest.approx(float((expected > 0).double().mean()))
    if behavior.metric == "accuracy":
        assert set(values) <= {0.0, 1.0}
        assert found.mean == found.accuracy
    elif behavior.metric == "kl":
        assert np.abs(values).max() < 1e-6
    else:
        hand = by_hand(behavior, load(tiny_llama)(rows_of(behavior)).logits.detach())
        np.testing.assert_allclose(values, hand.numpy(), rtol=1e-4, atol=1e-4)
        assert found.stderr == pytest.approx(float(hand.std() / len(hand) ** 0.5), rel=1e-3)
    assert not found.is_able  # five random pairs prove nothing, whatever their accuracy


def test_luck_is_the_binomial_tail() -> None:
    assert luck(0, 9) == 1
    assert luck(9, 9) == 1 / 512
    assert luck(8, 9) == 10 / 512


@pytest.mark.parametrize("behavior", [contrasts(), contrasts("loss"), sentences(), sentences("loss")])
def test_values_of_some_rows_come_from_their_logits(behavior: Behavior, tiny_llama: Path) -> None:
    ids, model = rows_of(behavior), load(tiny_llama, torch.float32)
    chosen = [len(ids) - 1, 0]
    with torch.no_grad():
        everything, some = (row_values(behavior, rows, model(ids[rows]).logits) for rows in (range(len(ids)), chosen))
    stream = open_stream(tiny_llama)
    expected = metric_values(stream, behavior, final_of(stream, ids))
    np.testing.assert_allclose(fold(behavior, everything).numpy(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(some, everything[chosen], rtol=1e-4, atol=1e-5)
