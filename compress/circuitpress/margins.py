"""How the margins of behaviors answer to weights: their gradients, and what a lean would bring.

1. `write_gradients`: G = d(mean margin)/dW of every matrix, by pulling d margin / d state through the blocks; apart for
   two halves of the pairs.
2. `responses`: K[b, c] = sum over matrices of <G_b, G_c H^-1>, the margin that behavior b gains for every nat that
   lambda_c offers (lean.py), to first order. G_b and G_c are of different halves, so that what only fits the pairs at
   hand does not count.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from .behaviors import Behavior
from .console import Advance, ignore
from .files import write_bytes_atomic
from .lean import HALVES, damped_factor, gradient_key, load_gradients
from .price import shard_path
from .rounding import block_hessians, context
from .score.fisher import pull
from .score.metrics import as_decision, metric_gradients, rows_of
from .score.walk import ascend, clean_inputs, final_states
from .stream import Stream, forward


def half_of(behavior: Behavior) -> Tensor:
    """Which half every row of `rows_of` belongs to, int64 [rows]; the sentences of a pair go together."""
    return torch.arange(len(rows_of(behavior))) % len(behavior) % len(HALVES)


def write_gradients(stream: Stream, behavior: Behavior, folder: Path, *, advance: Advance = ignore) -> None:
    """Writes d(mean margin)/dW [rows, cols] of every matrix, a bfloat16 shard a block; shards that exist stay.

    ValueError for fewer than two pairs.
    """
    if len(behavior) < len(HALVES):
        raise ValueError(f"{behavior.name}: {len(behavior)} pairs have no halves")
    if all(shard_path(folder, block.index).exists() for block in stream.anatomy.blocks):
        return
    decision = as_decision(behavior)
    halves, store = half_of(decision), stream.store("margins")
    pairs = [int((torch.arange(len(decision)) % len(HALVES) == half).sum()) for half in HALVES]
    try:
        ascend(stream, {"clean": clean_inputs(stream, decision)}, store, advance=advance)
        gradients = metric_gradients(stream, decision, final_states(stream, store, "clean"))
        for place in reversed(stream.anatomy.blocks):
            totals = {
                (half, m.module): torch.zeros(m.rows, m.cols, device=stream.device)
                for half in HALVES
                for m in place.matrices
            }
            with stream.block(place.index) as module:
                at = 0
                for b, gradient in enumerate(gradients):
                    hidden = store.get(("clean", place.index, b), stream.device)
                    gradients[b], flows = pull(stream, module, place, hidden, gradient)
                    here = halves[at : at + len(hidden)].repeat_interleave(hidden.shape[1]).to(stream.device)
                    for (half, name), total in totals.items():
                        mine, flow = here == half, flows[name]
                        total.addmm_(flow.g[mine].float().T, flow.x[mine].float())
                    store.drop(("clean", place.index, b))
                    at += len(hidden)
            means = {gradient_key(half, name): total / pairs[half] for (half, name), total in totals.items()}
            tensors = {key: mean.bfloat16().cpu() for key, mean in means.items()}
            write_bytes_atomic(shard_path(folder, place.index), save(tensors))
            advance(1, f"block {place.index}, gradients of {behavior.name}")
    finally:
        store.clear()


def responses(
    stream: Stream, folders: Sequence[Path], *, calibration: Tensor, saliency: Path, advance: Advance = ignore
) -> NDArray[np.float64]:
    """K [n, n]: the mean margin that behavior b gains for every nat that lambda_c offers, to first order.

    `folders` hold the gradients of the n behaviors; `calibration` and `saliency` as of `probe.plan_edits`.
    """
    windows = context(calibration, saliency)
    batches, store = stream.batches(windows), stream.store("responses")
    total = np.zeros((len(folders), len(folders)))

    def visit(index: int, module: nn.Module, inputs: Callable[[int], Tensor]) -> None:
        place = stream.anatomy.blocks[index]
        hessians = block_hessians(stream, module, place, inputs, len(batches), saliency)
        first, second = ([load_gradients(folder, place, half, stream.device) for folder in folders] for half in HALVES)
        for name, hessian in hessians.items():
            if (factor := damped_factor(hessian)) is None:
                continue
            moved = [torch.cholesky_solve(gradients[name].T, factor).T for gradients in second]
            for b, gradients in enumerate(first):
                total[b] += [float((gradients[name] * move).sum(dtype=torch.float64)) for move in moved]

    try:
        forward(stream, batches, store, visit=visit, advance=advance)
    finally:
        store.clear()
    return (total + total.T) / 2
