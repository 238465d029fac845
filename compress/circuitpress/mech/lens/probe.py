"""Linear probes: what a linear map can read off the residual stream, with the controls that give it a meaning.

1. Labels: one class a token. The built-in task asks for a property of the *previous* token (is it one of the common
   tokens that make up half of the text?), which only attention can bring to a position.
2. An L2-regularised logistic regression in float64 (L-BFGS), trained on some windows and judged on others: tokens of
   one window are not independent, so a split by tokens would leak.
3. The control task (Hewitt and Liang, arXiv 1909.03368): every token type gets a random class, drawn once with the
   same frequencies. What a probe reaches on it is memory, not structure; selectivity = accuracy - control accuracy.
4. The share of the largest class, the accuracy of knowing nothing, stands beside both.

That something can be decoded does not say that the model uses it. Evidence: correlational.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...console import Advance, ignore
from ...errors import CircuitpressError
from ...stream import Stream, forward

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Probe:
    """Held-out accuracy of the task and of its control at one place; `majority` is the share of the largest class."""

    place: str
    accuracy: float
    control: float
    majority: float
    control_majority: float
    tokens: int

    @property
    def selectivity(self) -> float:
        """accuracy - control."""
        return self.accuracy - self.control


@dataclass(frozen=True)
class Logistic:
    """A fitted classifier: classes = argmax(((x - mean) / scale) weight + bias); weight [d, c], bias [c]."""

    mean: Array
    scale: Array
    weight: Array
    bias: Array

    def predict(self, x: Array) -> NDArray[np.int64]:
        """Classes [n] of rows x [n, d]."""
        return (((x - self.mean) / self.scale) @ self.weight + self.bias).argmax(1)


def fit_logistic(x: Array, labels: NDArray[np.int64], *, classes: int, l2: float = 1e-3) -> Logistic:
    """Minimises mean cross-entropy + l2/2 |weight|^2 on standardised rows x [n, d] with labels [n] below `classes`."""
    mean, scale = x.mean(0), x.std(0) + 1e-8
    z = (x - mean) / scale
    n, d = z.shape
    onehot = np.zeros((n, classes))
    onehot[np.arange(n), labels] = 1

    def loss(flat: Array) -> tuple[float, Array]:
        weight, bias = flat[: d * classes].reshape(d, classes), flat[d * classes :]
        logits = z @ weight + bias
        logits -= logits.max(1, keepdims=True)
        p = np.exp(logits)
        total = p.sum(1, keepdims=True)
        value = float((np.log(total[:, 0]) - (logits * onehot).sum(1)).mean()) + 0.5 * l2 * float((weight**2).sum())
        delta = (p / total - onehot) / n
        return value, np.concatenate([(z.T @ delta + l2 * weight).ravel(), delta.sum(0)])

    start = np.zeros(d * classes + classes)
    found = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 200})
    return Logistic(mean, scale, found.x[: d * classes].reshape(d, classes), found.x[d * classes :])


def previous_is_common(ids: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Labels [n, length] of the built-in task (-1 at the first position) and of its control, from windows of ids."""
    tokens = ids.numpy()
    kinds, counts = np.unique(tokens, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    common = kinds[order[np.cumsum(counts[order]) <= tokens.size / 2]]
    # The control's classes are as frequent, but which token types are in them is drawn.
    draw = np.random.default_rng(0).permutation(len(kinds))
    drawn = kinds[draw[np.cumsum(counts[draw]) <= tokens.size / 2]]
    labels = []
    for chosen in (common, drawn):
        row = np.full(tokens.shape, -1, dtype=np.int64)
        row[:, 1:] = np.isin(tokens[:, :-1], chosen)
        labels.append(row)
    return labels[0], labels[1]


def probe(
    x: Mapping[str, Tensor], labels: NDArray[np.int64], control: NDArray[np.int64], *, held_out: float = 0.3,
    l2: float = 1e-3,
) -> list[Probe]:  # fmt: skip
    """Probes activations [n, length, d], by place, for `labels` and `control` [n, length]; -1 is left out.

    The last `held_out` share of the windows judges. CircuitpressError if either part is empty.
    """
    n = labels.shape[0]
    cut = n - max(1, round(n * held_out))
    if cut < 1:
        raise CircuitpressError(f"{n} windows cannot be split for a probe", hint="pass more --windows")
    rows = []
    for place, values in x.items():
        whole = values.double().cpu().numpy()
        scores = []
        for target in (labels, control):
            train, test = target[:cut] >= 0, target[cut:] >= 0
            classes = int(target.max()) + 1
            model = fit_logistic(whole[:cut][train], target[:cut][train], classes=max(2, classes), l2=l2)
            truth = target[cut:][test]
            largest = np.bincount(truth, minlength=2).max() / truth.size
            scores.append((float((model.predict(whole[cut:][test]) == truth).mean()), float(largest)))
        (accuracy, majority), (other, other_majority) = scores
        rows.append(Probe(place, accuracy, other, majority, other_majority, int((labels[cut:] >= 0).sum())))
    return rows


@torch.no_grad()
def probe_stream(stream: Stream, windows: Tensor, *, advance: Advance = ignore) -> list[Probe]:
    """The built-in task at the input of every block and at the end, on windows int64 [n, length]."""
    batches, store = stream.batches(windows), stream.store("probe")
    labels, control = previous_is_common(windows)
    try:
        forward(stream, batches, store, keep=True, advance=advance)
        rows = []
        for i in range(stream.depth + 1):
            x = torch.cat([store.get((i, b), "cpu") for b in range(len(batches))])
            place = f"L{i}.resid_pre" if i < stream.depth else f"L{i - 1}.resid_post"
            rows += probe({place: x}, labels, control)
        return rows
    finally:
        store.clear()
