"""Refines a compressed model as a whole: codes, scales and norms follow the gradient of the very KL that is reported.

Rounding looks at one matrix at a time: it cannot know that the errors of two matrices could cancel. Once all codes
exist, the whole model is differentiable in them (soft.py), so

1. keep the original's final hidden states on the calibration text and on text that the original itself writes
   (continuations.py): KL needs no labels, so a model can be taught on what it says;
2. for a number of steps: draw a few windows, compute KL(original || model) in nats per token, and move codes, log
   scales and norms by Adam (arXiv 1412.6980) with a rate that falls to zero;
3. round, measure on held-out windows before and after, and keep the better of the two.

The bytes do not change: the formats, and so the plan, are what they were.

Block-wise tuning (AutoRound, arXiv 2309.05516) needs less memory, but matches the outputs of a block, in which most
directions do not matter to the prediction. On int4g64 babyllama-105 with 32 k tokens of text, whole-model KL halves in
200 steps. All of the model is in memory, at 20 bytes a packed weight (`memory`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import family_of
from ..behaviors import Behavior
from ..checkpoint import Weights, read_headers
from ..console import Advance, ignore
from ..errors import CircuitpressError
from ..formats import Format, pack_segments
from ..score.metrics import as_decision, row_values, rows_of
from ..stream import Stream, forward
from .load import load_soft
from .soft import SoftLinear, straight_through


@dataclass(frozen=True)
class Rates:
    """Learning rates of Adam at the first step: codes in codes, log scales, and norms relative to their size."""

    codes: float = 0.02
    scales: float = 0.005
    norms: float = 0.005


@dataclass(frozen=True, eq=False)
class Lesson:
    """Prompts to learn from beside the text: rows `ids` int64 [n, length], whose KL counts at `positions` bool [n,
    length], each prediction `weight` times as much as one of the text."""

    ids: Tensor
    positions: Tensor
    weight: float


@dataclass(frozen=True, eq=False)
class Hold:
    """A behavior whose mean margin should not fall below `aim`: a unit of margin below it counts `rate` nats.

    `dense` float32 [n] are the margins of the original: of a few pairs as much is expected as of all, in proportion.
    """

    behavior: Behavior
    dense: Tensor
    aim: float
    rate: float


@dataclass(frozen=True)
class Refined:
    """What refinement did: KL in nats per token on the held-out windows, and the tensors that changed."""

    steps: int
    tokens: int
    """Tokens of text, those of the original's own included, that were learned from."""
    kl_before: float
    kl_after: float
    kept: bool
    """Whether the refined model was better on the held-out windows."""
    tensors: Mapping[str, Tensor]
    """The stored tensors that changed, by name; empty if not kept."""

    def to_json(self) -> dict[str, Any]:
        """Everything but the tensors."""
        document = asdict(self)
        del document["tensors"]
        return document


def memory(packed: int, others: int) -> int:
    """Peak bytes for this many packed and other weights: codes, weights, gradients and two moments in float32."""
    return 20 * packed + 4 * others


def packed_numel(folder: Path) -> int:
    """Number of packed weights in a model folder."""
    return sum(entry["shape"][0] * entry["shape"][1] for entry in read_headers(folder, packed_ok=True).packed.values())


def refine(
    folder: Path, reference: Stream, windows: Tensor, held_out: Tensor, *, steps: int, seed: int = 0,
    batch_tokens: int = 2048, rates: Rates | None = None, lessons: Sequence[Lesson] = (), holds: Sequence[Hold] = (),
    advance: Advance = ignore,
) -> Refined:  # fmt: skip
    """Refines the packed model in `folder` towards `reference`; writes nothing (see `write.py`).

    `windows` int64 [n, length] are learned from, `held_out` [m, length] decide whether the result is kept; `steps` are
    of `batch_tokens` tokens each, and of a quarter of that for each of `lessons` and `holds`. Raises CircuitpressError
    for a model without packed weights, and when the loss is no longer finite.
    """
    device = reference.device
    student, soft = load_soft(folder, device)
    norms = {name: nn.Parameter(value.detach().clone()) for name, value in _norms(student, soft).items()}
    dtypes = _stored_types(folder, norms)
    codes = [p for module in soft.values() for part in module.segments() for p in part.codes()]
    scales = [p for module in soft.values() for part in module.segments() for p in part.scales()]
    if not codes and not scales:
        raise CircuitpressError(f"{folder} has no packed weights to refine", hint="set refine.steps to 0")
    rates = rates or Rates()
    groups = [{"params": codes, "lr": rates.codes}, {"params": scales, "lr": rates.scales}]
    groups += [{"params": [p], "lr": rates.norms * float(p.detach().abs().mean())} for p in norms.values()]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], betas=(0.9, 0.95), eps=1e-12)
    starts = [group["lr"] for group in optimizer.param_groups]
    before = {name: _values(module) for name, module in soft.items()}
    teacher = _Teacher(reference, torch.cat([windows, held_out]))
    taught = [(lesson, _Teacher(reference, lesson.ids)) for lesson in lessons]
    learn, check = range(len(windows)), range(len(windows), len(windows) + len(held_out))
    per = max(1, batch_tokens // windows.shape[1])

    def answer(ids: Tensor) -> Tensor:
        changed = {name: straight_through(p, partial(Tensor.to, dtype=dtypes[name])) for name, p in norms.items()}
        return torch.func.functional_call(student, changed, (ids.to(device),), {"use_cache": False}).logits.float()

    def loss(rows: Sequence[int]) -> Tensor:
        return _kl(teacher.logits(rows), answer(teacher.ids[list(rows)]))

    def lesson_loss(step: int, lesson: Lesson, known: _Teacher) -> Tensor:
        count = len(lesson.ids)
        start = step * (per_lesson := max(1, min(count, batch_tokens // 4 // lesson.ids.shape[1])))
        rows = [(start + k) % count for k in range(per_lesson)]
        at = lesson.positions[rows].to(device)
        return lesson.weight * _kl(known.logits(rows)[at], answer(lesson.ids[rows])[at])

    def fallen(step: int, hold: Hold) -> Tensor:
        decision = as_decision(hold.behavior)
        ids, count = rows_of(decision), len(decision)
        per_hold = max(1, min(count, batch_tokens // 4 * count // ids.numel()))
        pairs = [(step * per_hold + k) % count for k in range(per_hold)]
        rows = [row for pair in pairs for row in range(pair, len(ids), count)]
        margin = row_values(decision, rows, answer(ids[rows])).sum() / len(pairs)
        expected = float(hold.dense[pairs].mean() - hold.dense.mean()) + hold.aim
        return hold.rate * torch.relu(expected - margin)

    def measured() -> float:
        with torch.no_grad():
            return float(sum(loss([row]) for row in check)) / len(check)

    kl_before = measured()
    order = _order(len(learn), per, steps, seed)
    for step, rows in enumerate(order):
        for group, rate in zip(optimizer.param_groups, starts, strict=True):
            group["lr"] = rate * (1 - step / steps)
        value = loss(rows) + sum(lesson_loss(step, *pair) for pair in taught)
        value = value + sum(fallen(step, hold) for hold in holds)
        if not bool(value.isfinite()):
            raise CircuitpressError(
                f"refinement of {folder} diverged at step {step}: the loss is {value.item()}",
                hint="set refine.steps to 0, or give a larger budget",
            )
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        advance(1, f"KL {value.item():.4g} at step {step + 1}")
    kl_after = measured()
    kept = kl_after < kl_before
    tensors: dict[str, Tensor] = {}
    if kept:
        for name, module in soft.items():
            if _changed(before[name], after := _values(module)):
                forms = [form for form, _ in after]
                packed = pack_segments(list(zip(forms, [value for _, value in after], strict=True)))
                tensors |= {f"{name}.{key}": tensor.cpu().contiguous() for key, tensor in packed.items()}
        tensors |= {name: p.detach().to(dtypes[name]).cpu().contiguous() for name, p in norms.items()}
    return Refined(steps, windows.numel(), kl_before, kl_after, kept, tensors)


def _norms(model: nn.Module, soft: Mapping[str, SoftLinear]) -> dict[str, Tensor]:
    """Vectors of the model: norm gains and biases. They are a thousandth of the weights and cost no bytes."""
    inside = {f"{name}.{own}" for name, module in soft.items() for own, _ in module.parts.named_parameters()}
    skip = {f"{name}.parts." for name in soft}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 1 and name not in inside and not name.startswith(tuple(skip))
    }


def _stored_types(folder: Path, norms: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    headers = read_headers(folder, packed_ok=True)
    weights = Weights(headers, family_of(headers.config).prefix)
    return {name: getattr(torch, headers.dtype(weights.stored_name(name) or name)) for name in norms}


def _values(module: SoftLinear) -> list[tuple[Format, Any]]:
    return [(part.form, part.value()) for part in module.segments()]


def _changed(before: Sequence[tuple[Format, Any]], after: Sequence[tuple[Format, Any]]) -> bool:
    pairs = zip(before, after, strict=True)
    return any(not torch.equal(form.decode(old), form.decode(new)) for (form, old), (_, new) in pairs)


def _order(count: int, per: int, steps: int, seed: int) -> list[list[int]]:
    """Rows of each step: all windows in a random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[int] = []
    while len(rows) < steps * per:
        rows += torch.randperm(count, generator=generator).tolist()
    return [rows[i * per : (i + 1) * per] for i in range(steps)]


def _kl(reference: Tensor, logits: Tensor) -> Tensor:
    """Mean over tokens of KL(reference || logits), both [..., vocab]."""
    p, q = reference.log_softmax(-1), logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


class _Teacher:
    """The original's predictions: its final hidden states are kept, logits are made when they are needed."""

    def __init__(self, reference: Stream, ids: Tensor) -> None:
        self.ids = ids
        self._stream = reference
        batches = reference.batches(ids)
        store = reference.store("teacher")
        try:
            forward(reference, batches, store)
            self._hidden = torch.cat([store.get((reference.depth, b), "cpu") for b in range(len(batches))])
        finally:
            store.clear()

    @torch.no_grad()
    def logits(self, rows: Sequence[int]) -> Tensor:
        """float32 [rows, length, vocab]."""
        return self._stream.logits(self._hidden[list(rows)].to(self._stream.device))
