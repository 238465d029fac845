"""The residual stream: how large it is at every depth, who writes it, and what share of the end each writer has.

With x_0 the embedding and x_(i+1) = x_i + attn_i + mlp_i,

    norms           mean |x_i|, |attn_i|, |mlp_i| over tokens, the first position apart (where an attention sink sits)
    cosines         between what a block's attention or MLP writes and the stream it is added to
    shares          mean of (part . x_final) / |x_final|^2: over the embedding and all parts they sum to 1

A part with a large share wrote much of the final direction; that the model needs it is another matter, as the model
organism with loud distractor heads shows. Evidence: correlational.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...console import Advance, ignore
from ...store import Store
from ...stream import Stream
from ..sites import read, walk


@dataclass(frozen=True)
class Written:
    """One writer: `part` is embedding, L3.attn_out or L3.mlp_out; norms of what it writes, at later positions and at
    the first; `stream_norm` of the stream before it; `cosine` of the two; its `share` of the final stream."""

    part: str
    norm: float
    first_norm: float
    stream_norm: float
    stream_first_norm: float
    cosine: float
    share: float


@torch.no_grad()
def residual(stream: Stream, windows: Tensor, *, advance: Advance = ignore) -> list[Written]:
    """All writers in order on windows int64 [n, length], length at least 2."""
    batches, parts = stream.batches(windows), stream.store("residual")
    order: list[str] = ["embedding"]

    def visit(index: int, module: nn.Module, b: int, hidden: Tensor) -> Tensor:
        if index == 0:
            parts.put(("embedding", b), hidden)
        found, output = read(stream, index, module, hidden, ["attn_out", "mlp_out"])
        for name, value in found.items():
            parts.put((f"L{index}.{name}", b), value)
        return output

    final = walk(stream, batches, visit, advance=advance)
    order += [f"L{index}.{name}" for index in range(stream.depth) for name in ("attn_out", "mlp_out")]
    try:
        return _rows(stream, parts, final, order, len(batches))
    finally:
        parts.clear()
        final.clear()


def _rows(stream: Stream, parts: Store, final: Store, order: list[str], count: int) -> list[Written]:
    sums = {part: torch.zeros(6, dtype=torch.float64) for part in order}
    later = first = 0
    for b in range(count):
        end = final.get((stream.depth, b), "cpu").double()
        before = torch.zeros_like(end)
        later, first = later + end[:, 1:, 0].numel(), first + end.shape[0]
        for part in order:
            value = parts.get((part, b), "cpu").double()
            norm, norm_before = value.norm(dim=-1), before.norm(dim=-1)
            cosine = (value * before).sum(-1) / (norm * norm_before).clamp(min=1e-30)
            share = (value * end).sum(-1) / end.square().sum(-1)
            sums[part] += torch.stack(
                [norm[:, 1:].sum(), norm[:, 0].sum(), norm_before[:, 1:].sum(), norm_before[:, 0].sum(),
                 cosine[:, 1:].sum(), share.sum()]
            )  # fmt: skip
            before = before + value
    scale = torch.tensor([later, first, later, first, later, later + first], dtype=torch.float64)
    return [Written(part, *(sums[part] / scale).tolist()) for part in order]
