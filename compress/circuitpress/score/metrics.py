"""The metric of a behavior: its values, and its gradient at the final hidden states.

A behavior becomes rows of token ids (`rows_of`) and *sites*: positions of those rows whose logits enter the metric,
each with one number that is a function of its logits alone. The value of a row is the sum over its sites, and the value
of a pair the sum over its rows:

- `Pairs`: one row and one site a pair. logit_diff (also behind accuracy): logit[answer] - logit[wrong]. loss:
  log p(answer). kl: - KL(reference || model) over the vocabulary.
- `Sentences`: log p(token) at every scored token, plus for the good sentence, minus for the bad one (two rows a pair).
  loss: the good sentence alone, divided by the number of its scored tokens.

Only sites meet lm_head, a few million logits at a time, so that a vocabulary of 128 k costs no more than one of 500.
Since a row's value depends on that row alone, gradients of the sum over rows are the gradients of every row.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..behaviors import Behavior, Pairs, Sentences
from ..stream import Stream
from .fisher import LOGIT_CHUNK


class Sites(NamedTuple):
    """Where a metric reads: k sites as int64 [k], `row` counted within the rows asked for, `weight` float32 [k]."""

    row: Tensor
    position: Tensor
    target: Tensor
    other: Tensor
    weight: Tensor


def rows_of(behavior: Behavior) -> Tensor:
    """The prompts to run, int64 [rows, length]: the clean ones, or all good sentences, then all bad ones."""
    pairs = behavior.pairs
    if isinstance(pairs, Pairs):
        return pairs.clean
    return pairs.good if behavior.metric == "loss" else torch.cat([pairs.good, pairs.bad])


def mask_of(behavior: Behavior) -> Tensor:
    """Which positions of `rows_of` are prompt and not padding, bool [rows, length]."""
    pairs, rows = behavior.pairs, rows_of(behavior)
    if isinstance(pairs, Pairs):
        length = pairs.position + 1
    else:
        length = torch.cat([pairs.good_length, pairs.bad_length])[: len(rows)]
    return torch.arange(rows.shape[1]) < length[:, None]


def fold(behavior: Behavior, rows: Tensor) -> Tensor:
    """Values of rows [..., rows] to values of pairs [..., n]: a pair of sentences is the sum of its two rows."""
    n = len(behavior)
    return rows if rows.shape[-1] == n else rows[..., :n] + rows[..., n:]


def as_decision(behavior: Behavior) -> Behavior:
    """The behavior with the metric whose sign says whether the model decides right: logit_diff or sentence."""
    return replace(behavior, metric="logit_diff" if isinstance(behavior.pairs, Pairs) else "sentence")


def metric_values(
    stream: Stream, behavior: Behavior, final: Sequence[Tensor], *, reference: Tensor | None = None
) -> NDArray[np.float64]:
    """The metric of every pair [n].

    `final` are the final hidden states [batch, length, hidden] of the rows of `rows_of`, batch by batch (see
    `Stream.batches`). `reference` are the logits [n, vocab] of `answer_logits` of another model or run, for metric kl.
    """
    rows, values = 0, []
    with torch.no_grad():
        for hidden in final:
            values.append(_row_values(stream, behavior, rows, hidden, reference, None))
            rows += hidden.shape[0]
    return fold(behavior, torch.cat(values)).double().cpu().numpy()


def row_values(behavior: Behavior, rows: Sequence[int], logits: Tensor) -> Tensor:
    """The metric of some rows of `rows_of`, float32 [k], from their logits [k, length, vocab]; differentiable.

    Not for metric kl, which compares with another model.
    """
    sites = [sites_of(behavior, row, 1) for row in rows]
    parts = []
    for k, mine in enumerate(sites):
        here = Sites(*(field.to(logits.device) for field in mine))
        parts.append(_site_values(behavior, logits[k, here.position], here, None).sum())
    return torch.stack(parts)


def metric_gradients(
    stream: Stream, behavior: Behavior, final: Sequence[Tensor], *, reference: Tensor | None = None
) -> list[Tensor]:
    """d(value of a row)/d(its final hidden states), in the shapes of `final`; zero away from the sites."""
    rows, gradients = 0, []
    for hidden in final:
        gradient = torch.zeros_like(hidden)
        _row_values(stream, behavior, rows, hidden, reference, gradient)
        gradients.append(gradient)
        rows += hidden.shape[0]
    return gradients


def answer_logits(stream: Stream, behavior: Behavior, final: Sequence[Tensor]) -> Tensor:
    """The logits float32 [n, vocab] at the position of every contrast pair. ValueError for sentences."""
    if not isinstance(behavior.pairs, Pairs):
        raise ValueError(f"{behavior.name}: sentences have no answer position")
    rows, result = 0, []
    with torch.no_grad():
        for hidden in final:
            sites = sites_of(behavior, rows, hidden.shape[0])
            states = hidden[sites.row, sites.position]
            result += [stream.logits(part) for part in states.split(_step(stream))]
            rows += hidden.shape[0]
    return torch.cat(result)


def sites_of(behavior: Behavior, first: int, count: int) -> Sites:
    """The sites of rows `first` to `first + count` of `rows_of`, in order of rows."""
    pairs, here = behavior.pairs, slice(first, first + count)
    if isinstance(pairs, Pairs):
        position = pairs.position[here]
        row = torch.arange(len(position))
        return Sites(row, position, pairs.answer[here], pairs.wrong[here], torch.ones(len(position)))
    return _sentence_sites(behavior, pairs, first, count)


def _sentence_sites(behavior: Behavior, pairs: Sentences, first: int, count: int) -> Sites:
    n = len(pairs)
    parts: list[tuple[int, Tensor, Tensor, float]] = []
    for row in range(first, first + count):
        ids, length = (pairs.good, pairs.good_length) if row < n else (pairs.bad, pairs.bad_length)
        start, stop = int(pairs.start[row % n]), int(length[row % n])
        weight = 1 / (stop - start) if behavior.metric == "loss" else 1.0 if row < n else -1.0
        # The logits at t - 1 predict the token at t.
        parts.append((row - first, torch.arange(start - 1, stop - 1), ids[row % n, start:stop], weight))
    return Sites(
        torch.cat([torch.full_like(position, row) for row, position, _, _ in parts]),
        torch.cat([position for _, position, _, _ in parts]),
        target := torch.cat([target for _, _, target, _ in parts]),
        target,
        torch.cat([torch.full(position.shape, weight) for _, position, _, weight in parts]),
    )


def _row_values(
    stream: Stream, behavior: Behavior, first: int, hidden: Tensor, reference: Tensor | None, gradient: Tensor | None
) -> Tensor:
    """Values float32 [batch] of the rows from `first` on; writes their gradients into `gradient`, where given."""
    if behavior.metric == "kl" and reference is None:
        raise ValueError(f"{behavior.name}: metric kl compares with a reference model: pass its answer_logits")
    sites = Sites(*(field.to(hidden.device) for field in sites_of(behavior, first, hidden.shape[0])))
    values = torch.zeros(hidden.shape[0], device=hidden.device)
    step = _step(stream)
    for at in range(0, len(sites.row), step):
        part = Sites(*(field[at : at + step] for field in sites))
        states = hidden[part.row, part.position].detach().requires_grad_(gradient is not None)
        with torch.set_grad_enabled(gradient is not None):
            logits = stream.logits(states)
            known = None if reference is None else reference[first + part.row.to(reference.device)].to(logits.device)
            value = _site_values(behavior, logits, part, known)
        values.index_add_(0, part.row, value.detach())
        if gradient is not None:
            pulled = torch.autograd.grad(value.sum(), states)[0]
            gradient.index_put_((part.row, part.position), pulled, accumulate=True)
    return values


def _site_values(behavior: Behavior, logits: Tensor, sites: Sites, reference: Tensor | None) -> Tensor:
    if behavior.metric in ("logit_diff", "accuracy"):
        return logits.gather(1, sites.target[:, None])[:, 0] - logits.gather(1, sites.other[:, None])[:, 0]
    logp = logits.log_softmax(-1)
    if behavior.metric == "kl":
        assert reference is not None
        known = reference.log_softmax(-1)
        return (known.exp() * (logp - known)).sum(-1)
    return sites.weight * logp.gather(1, sites.target[:, None])[:, 0]


def _step(stream: Stream) -> int:
    return max(1, LOGIT_CHUNK // stream.anatomy.vocab)
