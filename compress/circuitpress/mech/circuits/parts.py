"""What every sender wrote into the residual stream of a run: the values that patching puts in another run's place.

Kept per token: the embedding, and for each block z (the heads' outputs before W_O, heads * head_dim numbers) and the
output of the MLP; about (2 depth + 1) * hidden numbers, 0.5 MB a token for an 8-billion-parameter Llama in 16 bit. The
heads' parts in the residual stream itself would be heads times as many (8.7 MB); they are made again from z, one block
at a time. The numbers live in a `Store` and spill to disk when they must.

Ablation puts reference values in the place of a sender's:
- `resample`: what the sender wrote at the same position of the corrupted prompt,
- `mean`: the mean of that over the corrupted prompts, position by position (Wang et al., arXiv 2211.00593),
- `zero`: nothing. The biases of output projections belong to no sender and stay.
"""

from typing import Literal

import torch
from torch import Tensor

from ...store import Store
from ...stream import Stream
from .split import Split

Ablation = Literal["resample", "mean", "zero"]
Site = Literal["embed", "heads", "mlp"]


class Parts:
    """The parts of one run, by micro-batch; `shared` parts are the same for all of them and broadcast over rows."""

    def __init__(self, store: Store, *, shared: bool) -> None:
        self._store = store
        self._shared = shared

    def get(self, site: Site, layer: int, batch: int, device: torch.device) -> Tensor:
        """[rows or 1, length or 1, width]: `embed` and `mlp` in hidden numbers, `heads` as z."""
        return self._store.get((site, layer, 0 if self._shared else batch), device)

    def put(self, site: Site, layer: int, batch: int, value: Tensor) -> None:
        """Keeps one value."""
        self._store.put((site, layer, batch), value)

    def clear(self) -> None:
        """Lets all values go."""
        self._store.clear()


@torch.no_grad()
def record(stream: Stream, batches: list[Tensor], name: str) -> tuple[Parts, list[Tensor]]:
    """The parts of the unchanged model on micro-batches of ids [rows, length], and the final hidden states of each."""
    parts = Parts(stream.store(name), shared=False)
    states = [stream.embed(ids) for ids in batches]
    for b, hidden in enumerate(states):
        parts.put("embed", 0, b, hidden)
    for layer in range(stream.depth):
        with stream.block(layer) as module:
            split = Split(stream, module, stream.anatomy.blocks[layer])
            for b, hidden in enumerate(states):
                pieces = split.run(hidden)
                parts.put("heads", layer, b, pieces.z)
                parts.put("mlp", layer, b, pieces.mlp)
                states[b] = pieces.middle + pieces.mlp
    return parts, states


@torch.no_grad()
def reference(stream: Stream, corrupted: list[Tensor], position: Tensor, ablation: Ablation) -> Parts:
    """The values that ablated senders take, from micro-batches of corrupted prompts that end at `position` [n]."""
    if ablation == "zero":
        return _zeros(stream)
    parts, _ = record(stream, corrupted, "circuit-reference")
    if ablation == "resample":
        return parts
    mean = Parts(stream.store("circuit-mean"), shared=True)
    real = (torch.arange(corrupted[0].shape[1]) <= position[:, None]).to(stream.device, stream.dtype)
    count = real.sum(0).clamp(min=1)[:, None]
    sites: list[tuple[Site, int]] = [("embed", 0)]
    written: tuple[Site, Site] = ("heads", "mlp")
    sites.extend((site, layer) for layer in range(stream.depth) for site in written)
    for site, layer in sites:
        total, row = torch.zeros((), device=stream.device, dtype=stream.dtype), 0
        for b, ids in enumerate(corrupted):
            weight = real[row : row + len(ids), :, None]
            total = total + (weight * parts.get(site, layer, b, stream.device)).sum(0)
            row += len(ids)
        mean.put(site, layer, 0, (total / count)[None])
    parts.clear()
    return mean


def _zeros(stream: Stream) -> Parts:
    parts = Parts(stream.store("circuit-zero"), shared=True)
    zeros = {"embed": stream.anatomy.hidden, "mlp": stream.anatomy.hidden}
    for layer, block in enumerate(stream.anatomy.blocks):
        zeros["heads"] = block.heads * block.head_dim
        for site in ("embed", "heads", "mlp") if layer == 0 else ("heads", "mlp"):
            parts.put(site, layer, 0, torch.zeros(1, 1, zeros[site], dtype=stream.dtype))
    return parts
