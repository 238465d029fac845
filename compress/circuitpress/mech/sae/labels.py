"""Labels of features in words: prompts that ask for one, and how well a given one tells where the feature fires.

1. `explain` writes, for a feature, a prompt with the text on which it peaks, its tokens marked; any language model or
   person can answer it. Nothing here writes a label.
2. `exam` draws, from other text, excerpts around a peak of the feature and as many from windows in which it is silent.
   Peaks are taken evenly from the highest to the lowest: the top alone is what labels were made from, and easier.
3. `detection` asks a judge about each excerpt whether the label fits it, as the difference of two logits, yes minus no.
   Language models lean to one of the two, so the half with the largest differences counts as yes; with equally many
   excerpts of both kinds, balanced accuracy is then the share of these that are of the firing kind, and 0.5 is chance.
4. The control is the same exam with another feature's label. What it reaches is due to the text, not to the label.

Detection is one of the scorers of Paulo et al. 2024, https://arxiv.org/abs/2410.13928, where a model answers in words.
A label that passes says where a feature fires on such text; that the feature *is* what the label says stays unproven,
all the more that the model uses it so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..examples import Examples, Excerpt, excerpt

Judge = Callable[[Sequence[str]], Sequence[float]]
"""Prompts of `question` to logit(yes) - logit(no) of each."""

_EXPLAIN = """Below are excerpts of text. In each, the tokens on which one feature of a language model is active stand \
between << and >>; how active it is at its peak is given after the excerpt. Say in one short phrase what these tokens, \
or what comes before them, have in common. Answer with the phrase alone.

{excerpts}

Phrase:"""
_QUESTION = """Does the text contain what the label says?

Label: {label}
Text: {text}

Answer Yes or No.
Answer:"""


@dataclass(frozen=True)
class Exam:
    """Excerpts for a feature as text: `texts` in a seeded order, and which of them hold a peak of it."""

    feature: int
    texts: tuple[str, ...]
    fires: tuple[bool, ...]


@dataclass(frozen=True)
class Detection:
    """How a label did: balanced `accuracy` and that of another feature's label, over `texts` excerpts.

    `stderr` is that of a single accuracy of 0.5. `evidence` is correlational and the claim unproven, whatever it says.
    """

    feature: int
    label: str
    accuracy: float
    other_label: str
    control: float
    texts: int
    stderr: float
    evidence: Literal["correlational"] = "correlational"
    status: Literal["unproven"] = "unproven"


def explain(examples: Examples, decode: Callable[[int], str]) -> str:
    """The prompt that asks for a label of one feature."""
    rows = [f"{_marked(row, decode)} ({row.value:.2f})" for row in examples.top]
    return _EXPLAIN.format(excerpts="\n".join(f"{i}. {row}" for i, row in enumerate(rows, start=1)))


def exam(
    feature: int, windows: Tensor, values: Tensor, decode: Callable[[int], str], *, count: int = 10, before: int = 12,
    after: int = 6, skip: int = 0, seed: int = 0,
) -> Exam | None:  # fmt: skip
    """At most `count` excerpts of each kind from windows int64 [n, length]; `values` [n, length] are the feature's.

    None where it fires in no window, or in all.
    """
    height, at = values.max(1)
    firing = height.argsort(descending=True, stable=True)[: int((height > 0).sum())]
    silent = (height <= 0).nonzero()[:, 0]
    count = min(count, len(firing), len(silent))
    if not count:
        return None
    draw = torch.Generator().manual_seed(seed * 1_000_003 + feature)
    even = (torch.arange(count) * len(firing)) // count
    spots = [(int(w), int(at[w])) for w in firing[even]]
    chosen = silent[torch.randperm(len(silent), generator=draw)[:count]]
    spots += [(int(w), int(torch.randint(skip, windows.shape[1], (1,), generator=draw))) for w in chosen]
    texts = ["".join(map(decode, excerpt(windows, values, w, t, before, after).ids)) for w, t in spots]
    order = torch.randperm(2 * count, generator=draw).tolist()
    return Exam(feature, tuple(texts[i] for i in order), tuple(i < count for i in order))


def question(label: str, text: str) -> str:
    """What a judge is asked about one excerpt."""
    return _QUESTION.format(label=" ".join(label.split()), text=" ".join(text.split()))


def detection(
    exams: Sequence[Exam], labels: Sequence[str], judge: Judge, *, seed: int = 0,
    advance: Callable[[float, str], None] = lambda *_: None,
) -> list[Detection]:  # fmt: skip
    """Every exam with its own label and with another feature's. ValueError for fewer than two different labels."""
    if len(set(labels)) < 2:
        raise ValueError("the control needs two different labels")
    rng = np.random.default_rng(seed)
    result = []
    for i, (one, label) in enumerate(zip(exams, labels, strict=True)):
        others = [other for j, other in enumerate(labels) if j != i and other != label]
        other = others[int(rng.integers(len(others)))]
        own, control = (
            balanced_accuracy(judge([question(text, t) for t in one.texts]), one.fires) for text in (label, other)
        )
        n = len(one.texts)
        result.append(Detection(one.feature, label, own, other, control, n, chance_error(n)))
        advance(1, f"feature {one.feature}")
    return result


def balanced_accuracy(scores: Sequence[float], fires: Sequence[bool]) -> float:
    """The share of the higher half of `scores` whose text fires; equal scores share the places that they straddle."""
    values, kinds = np.asarray(scores, dtype=np.float64), np.asarray(fires)
    half = len(values) // 2
    edge = np.sort(values)[::-1][half - 1]
    above, level = values > edge, values == edge
    return float((kinds[above].sum() + (half - above.sum()) * kinds[level].mean()) / half)


def chance_error(texts: int) -> float:
    """The standard deviation of `balanced_accuracy` when scores say nothing (hypergeometric)."""
    half = texts // 2
    return 0.5 / (texts - 1) ** 0.5 if half else float("nan")


def _marked(row: Excerpt, decode: Callable[[int], str]) -> str:
    """The excerpt with the tokens above half of its peak between << and >>; runs of them are marked as one."""
    high = [value > row.value / 2 for value in row.values]
    text = ""
    for i, (token, on) in enumerate(zip(row.ids, high, strict=True)):
        opens, closes = on and not (i and high[i - 1]), on and (i + 1 == len(high) or not high[i + 1])
        text += "<<" * opens + decode(token) + ">>" * closes
    return " ".join(text.split())
