"""The training losses of the architectures, on activations z [batch, d] of mean norm sqrt(d).

All minimise the fraction of variance unexplained, FVU = sum (z - z^)^2 / sum (z - mean z)^2, which has no unit, plus

- TopK, BatchTopK: AuxK (arXiv 2406.04093, appendix A.2): the d/2 largest of the latents that no longer fire must
  reconstruct the error of the others, 1/32 of its own FVU. It is what keeps latents alive.
- JumpReLU: lambda (L0 / k - 1)^2 (the variant of arXiv 2407.14435 that aims at one L0), so that `k` means the same for
  every architecture. The step has no gradient for its threshold: a rectangle of a given bandwidth around it stands in
  for the Dirac delta (straight-through estimators, ibid., section 3).

TopK takes the k largest of every row, BatchTopK the k * batch largest of all rows together (arXiv 2412.06410), so that
a token may use more features than another.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .value import keep_largest

Recipe = Literal["topk", "batchtopk", "jumprelu"]

AUX = 1 / 32


@dataclass
class Weights:
    """What is learnt: w_enc [d, n], b_enc [n], w_dec [n, d], b_dec [d] and, for JumpReLU, log_threshold [n]."""

    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_dec: Tensor
    log_threshold: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Step:
    """One evaluation: the `loss` to descend, its `fvu`, which latents `fired` [n], how many a row (`l0`), and `least`,
    the smallest activation used."""

    loss: Tensor
    fvu: float
    fired: Tensor
    l0: float
    least: float


def evaluate(
    recipe: Recipe, weights: Weights, z: Tensor, k: int, dead: Tensor, *, sparsity: float = 0.0, bandwidth: float = 0.1
) -> Step:
    """The loss on a batch; `dead` [n] marks the latents that AuxK revives, `sparsity` is lambda of JumpReLU."""
    pre = (z - weights.b_dec) @ weights.w_enc + weights.b_enc
    penalty = z.new_zeros(())
    if recipe == "jumprelu":
        assert weights.log_threshold is not None
        a, count = _JumpReLU.apply(pre, weights.log_threshold.exp(), bandwidth)  # pyright: ignore
        penalty = sparsity * (count.mean() / k - 1).square()
    else:
        a = keep_largest(pre, k) if recipe == "topk" else keep_largest(pre.flatten(), k * len(z)).view_as(pre)
    error = a @ weights.w_dec + weights.b_dec - z
    fvu = error.square().sum() / _variance(z)
    if recipe != "jumprelu" and bool(dead.any()):
        penalty = AUX * _aux(weights, pre, error.detach(), dead)
    used = a.detach() > 0
    least = float(a.detach()[used].min()) if bool(used.any()) else float("nan")
    return Step(fvu + penalty, float(fvu.detach()), used.any(0), float(used.sum(1).float().mean()), least)


def _variance(z: Tensor) -> Tensor:
    return (z - z.mean(0)).square().sum()


def _aux(weights: Weights, pre: Tensor, error: Tensor, dead: Tensor) -> Tensor:
    """How much of the error the largest dead latents leave, less if there are few of them."""
    index = dead.nonzero()[:, 0]
    most = max(1, error.shape[1] // 2)
    a = keep_largest(pre[:, index], most)
    left = (a @ weights.w_dec[index] + error).square().sum() / _variance(error)  # error is z^ - z
    return min(1.0, len(index) / most) * left


class _JumpReLU(torch.autograd.Function):
    """(pre above threshold else 0, number of those in each row), with gradients for the threshold."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        on = (pre > threshold) & (pre > 0)
        return pre * on, on.sum(1, dtype=pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        g_a, g_count = grads
        near = ((pre - threshold).abs() < ctx.bandwidth / 2) / ctx.bandwidth
        to_threshold = -(near * (threshold * g_a + g_count[:, None])).sum(0)
        return g_a * ((pre > threshold) & (pre > 0)), to_threshold, None
