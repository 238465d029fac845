"""What a behavior is: prompts, and a number that says whether the model does the thing.

Two shapes cover what the field uses. `Pairs` are contrast pairs: a prompt, a corrupted prompt of the same length in
which the answer differs, and the two answer tokens; the metric is the difference of two logits at one position, which
is linear in the final residual stream (Wang et al., arXiv 2211.00593; Zhang and Nanda, arXiv 2309.16042). `Sentences`
are minimal pairs of whole sentences (BLiMP, arXiv 1912.00582); the metric is a difference of log-probabilities.

Rows are padded on the right with any id: in a causal model nothing before the padding sees it.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

Metric = Literal["logit_diff", "accuracy", "loss", "kl", "sentence"]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Contrast pairs, aligned token by token: position t of `clean` and of `corrupted` play the same part.

    `clean` and `corrupted` are int64 [n, length], padded on the right; `position` int64 [n] is the index whose logits
    predict the answer (the last token of the prompt); `answer` and `wrong` int64 [n] are token ids.
    """

    clean: Tensor
    corrupted: Tensor
    position: Tensor
    answer: Tensor
    wrong: Tensor

    def __len__(self) -> int:
        return self.clean.shape[0]


@dataclass(frozen=True, eq=False)
class Sentences:
    """Pairs of sentences of which a model should find the good one likelier.

    `good` and `bad` are int64 [n, length], padded on the right; `good_length` and `bad_length` int64 [n] count their
    tokens; `start` int64 [n] is the index of the first token that is scored, at least 1: what comes before it is the
    same in both.
    """

    good: Tensor
    bad: Tensor
    good_length: Tensor
    bad_length: Tensor
    start: Tensor

    def __len__(self) -> int:
        return self.good.shape[0]


@dataclass(frozen=True, eq=False)
class Behavior:
    """Something that a model does, as prompts and a metric; larger is better for every metric.

    `metric` of Pairs is `logit_diff` (logit of the answer minus that of the wrong one), `accuracy` (the share of pairs
    in which that is positive; derivatives are those of logit_diff), `loss` (log-probability of the answer, in nats) or
    `kl` (minus KL from the reference model's distribution at the position, in nats). Of Sentences it is `sentence`
    (summed log-probability of good minus bad) or `loss` (that of good alone, per token; `bad` is then good's tokens in
    another order and serves as a baseline). `provenance` says where the prompts come from.
    """

    name: str
    metric: Metric
    pairs: Pairs | Sentences
    provenance: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pairs)

    def take(self, rows: Tensor) -> "Behavior":
        """The behavior on some of its pairs: `rows` are indices int64 [m] or a mask bool [n]."""
        names = ("clean", "corrupted", "position", "answer", "wrong")
        if isinstance(self.pairs, Sentences):
            names = ("good", "bad", "good_length", "bad_length", "start")
        return replace(self, pairs=replace(self.pairs, **{name: getattr(self.pairs, name)[rows] for name in names}))
