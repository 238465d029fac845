"""Rounding that leans towards what named behaviors need.

KL is flat around the original, so what rounding costs text is of second order. The margin of a behavior is not flat: a
change dW moves it by <G, dW> with G = d margin / dW, and errors that cost text little can add up to its loss, or to
nothing. If text may pay lambda nats for a unit of margin, the best weights are no longer W but

    W' = argmin_V  1/2 tr((V - W) H (V - W)^T) - lambda <G, V>  =  W + lambda G H^-1

(H = E[s x x^T] as in rounding.py; several behaviors add their lambda G), and it is W' that codes are rounded from. The
bytes stay what they are. Weights that are stored in 16 bits stay as the checkpoint has them. With G = 0 this is
second-order rounding (GPTQ, arXiv 2210.17323); a first-order term of text has its own place in prefix.py.

The gradients are made by margins.py, lambda is found by measurement (run/leaning.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .anatomy import Block
from .price import shard_path

HALVES = (0, 1)
"""Of a behavior's pairs: gradients are kept apart, so that a lean on one half can be judged by the other."""
DAMPING = 1.0
"""Of H, times the mean of its diagonal. Prompts of a behavior are unlike text, and along inputs that text hardly knows
H^-1 would follow the pairs at hand: from a hundredth to one the share of a first-order gain that other pairs see rises
from .41 to .46 on stories260K's word order."""


@dataclass(frozen=True)
class Lean:
    """One behavior's pull on rounding: its gradient shards, and lambda in nats per unit of its mean margin."""

    folder: Path
    nats: float
    halves: tuple[int, ...] = HALVES
    """The halves of its pairs whose mean gradient pulls."""


def pulls(leans: Sequence[Lean], place: Block, device: torch.device) -> dict[str, Tensor]:
    """sum_b lambda_b G_b float32 [rows, cols] of a block's matrices by module name; empty if nothing pulls."""
    result: dict[str, Tensor] = {}
    for lean in leans:
        if not lean.nats:
            continue
        for half in lean.halves:
            for name, gradient in load_gradients(lean.folder, place, half, device).items():
                share = gradient.mul_(lean.nats / len(lean.halves))
                result[name] = result[name].add_(share) if name in result else share
    return result


def leant(weight: Tensor, hessian: Tensor, pulled: Tensor | None) -> Tensor:
    """W' = W + pulled (H + damping)^-1 float32 [rows, cols]; W where nothing pulls or H cannot be factored."""
    if pulled is None or (factor := damped_factor(hessian)) is None:
        return weight
    return weight + torch.cholesky_solve(pulled.T, factor).T


def load_gradients(folder: Path, place: Block, half: int, device: torch.device) -> dict[str, Tensor]:
    """d(mean margin)/dW float32 [rows, cols] over one half of the pairs, of a block's matrices by module name."""
    with safe_open(shard_path(folder, place.index), framework="pt") as file:
        return {m.module: file.get_tensor(gradient_key(half, m.module)).float().to(device) for m in place.matrices}


def gradient_key(half: int, module: str) -> str:
    """The name of a gradient in its shard."""
    return f"half{half}.{module}"


def damped_factor(hessian: Tensor) -> Tensor | None:
    """The Cholesky factor of H with its damping; None if it has none."""
    damped = hessian.float().clone()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(damped)
    return None if int(info) or not bool(factor.isfinite().all()) else factor
