"""Drop prices: what every layer loses, in nats, when it keeps fewer neurons or key-value groups, after compensation.

For each block, from the last to the first, while it is resident:

1. Pull the gradients of all micro-batches through it. For the two matrices through which units enter the residual
   stream (`o` for key-value groups, `down` for neurons) this gives H = E[x x^T] of the inputs and G = E[g g^T] of the
   gradients at the outputs.
2. Order the units for removal (select.py).
3. For every width of the ladder, compensate (compensate.py), pull the gradients through once more and price the change
   that is left: with dY = W' x_S - W x,

       price = 1/2 E_t [ (g_t . dY_t)^2 ]

The sets of a ladder are nested, so one order serves all widths, and the planner may mix: prices of layers and of the
two kinds add up. A block's results are one atomic shard, which a rerun skips after pulling the gradients through.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save
from torch import Tensor, nn

from ..anatomy import Block
from ..console import Advance, ignore
from ..files import write_bytes_atomic
from ..hooks import weight_of
from ..score.fisher import Flow, output_gradients, pull
from ..store import Store, return_freed_memory
from ..stream import Stream, backward, forward
from ..units import UnitId
from ..widths import Widths, heads_can_leave
from .compensate import compensate
from .select import removal_order

KINDS = {"neuron": "down", "kv_group": "o"}
"""The matrix through whose columns each kind of unit enters the residual stream."""


@dataclass(frozen=True)
class Drops:
    """What widths cost, and which units leave.

    `widths[kind]` are the widths of the ladder, widest first; `nats[kind]` [layers, widths] their prices and
    `stderr[kind]` the standard errors over windows. `order[kind][layer]` are unit indices in the order in which they
    leave. Kinds are `neuron` and `kv_group`.
    """

    widths: Mapping[str, tuple[int, ...]]
    nats: Mapping[str, NDArray[np.float64]]
    stderr: Mapping[str, NDArray[np.float64]]
    order: Mapping[str, tuple[NDArray[np.int64], ...]]

    def stay(self, kind: str, layer: int, width: int, total: int) -> NDArray[np.int64]:
        """The units of one layer that stay at `width` of `total`, in their old order."""
        return np.setdiff1d(np.arange(total), self.order[kind][layer][: total - width])

    def price(self, widths: Widths) -> float:
        """The price of `widths` in all layers; ValueError for one that is not on the ladder."""
        wanted = {"neuron": widths.neurons, "kv_group": widths.kv_groups}
        return sum(float(self.nats[kind][:, self.widths[kind].index(width)].sum()) for kind, width in wanted.items())


def price_drops(
    stream: Stream, windows: Tensor, *, neurons: Sequence[int], kv_groups: Sequence[int],
    keep: frozenset[UnitId] = frozenset(), draws: int = 1, seed: int = 0, folder: Path, advance: Advance = ignore,
) -> Drops:  # fmt: skip
    """Prices the widths `neurons` and `kv_groups` (units that stay in a layer) on `windows` int64 [n, length].

    `keep` are units that no width may remove, `folder` the place of the per-block shards. Raises ValueError if a width
    is too small for them.
    """
    batches = stream.batches(windows)
    ladders = {"neuron": _ladder(neurons), "kv_group": _ladder(kv_groups)}
    hidden, gradients = stream.store("inputs"), stream.store("gradients")
    try:
        forward(stream, batches, hidden, keep=True, advance=lambda n, note: advance(n / 2, f"forward, {note}"))
        keys = output_gradients(stream, batches, hidden, gradients, draws=draws, seed=seed)

        def visit(index: int, module: nn.Module, inputs: Callable[[int], Tensor]) -> None:
            place = stream.anatomy.blocks[index]
            pricer = _Pricer(stream, module, place, inputs, gradients, keys, windows.shape[1])
            path = _shard(folder, index)
            if path.exists():
                pricer.pull_all()
            else:
                write_bytes_atomic(path, save(pricer.price(ladders, keep)))
            advance(0.5, f"priced block {index}")

        backward(stream, hidden, len(batches), visit)
    finally:
        hidden.clear()
        gradients.clear()
    shards = [load_file(_shard(folder, place.index)) for place in stream.anatomy.blocks]
    return Drops(
        widths=ladders,
        nats={kind: np.stack([shard[f"nats.{kind}"] for shard in shards]) for kind in KINDS},
        stderr={kind: np.stack([shard[f"stderr.{kind}"] for shard in shards]) for kind in KINDS},
        order={kind: tuple(shard[f"order.{kind}"] for shard in shards) for kind in KINDS},
    )


def unit_width(place: Block, kind: str) -> int:
    """Columns of `o` or `down` that one unit owns: all heads of a key-value group, one column of a neuron."""
    return place.heads // place.kv_heads * place.head_dim if kind == "kv_group" else 1


def columns_of(units: Tensor, width: int) -> Tensor:
    """The columns of units that own `width` consecutive ones each."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _ladder(widths: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(set(widths), reverse=True))


def _shard(folder: Path, index: int) -> Path:
    return folder / f"block-{index:05d}.safetensors"


class _Pricer:
    """The work on one resident block."""

    def __init__(
        self, stream: Stream, module: nn.Module, place: Block, inputs: Callable[[int], Tensor], gradients: Store,
        keys: Sequence[tuple[int, int]], length: int,
    ) -> None:  # fmt: skip
        self.stream, self.module, self.place = stream, module, place
        self.inputs, self.gradients, self.keys, self.length = inputs, gradients, keys, length

    def pull_all(self, see: Callable[[Mapping[str, Flow]], None] | None = None, *, keep: bool = False) -> None:
        """Pulls every gradient through the block; with `keep` the gradients at its output stay in place."""
        for b, draw in self.keys:
            return_freed_memory()
            gradient = self.gradients.get((b, draw), self.stream.device)
            pulled, flows = pull(self.stream, self.module, self.place, self.inputs(b), gradient)
            if not keep:
                self.gradients.put((b, draw), pulled)
            if see is not None:
                see(flows)

    def price(self, ladders: Mapping[str, tuple[int, ...]], keep: frozenset[UnitId]) -> dict[str, NDArray[Any]]:
        """The arrays of the block's shard."""
        place = self.place
        moments, grams = self._statistics()
        counts = {"neuron": place.neurons, "kv_group": place.kv_heads}
        arrays: dict[str, NDArray[Any]] = {}
        changes: dict[str, list[Tensor]] = {}
        for kind, role in KINDS.items():
            matrix, width, total = place.role(role), unit_width(place, kind), counts[kind]
            weight = weight_of(self.module, place, matrix).float()
            count = total - min(ladders[kind])
            stays = torch.tensor([UnitId(place.index, kind, i) in keep for i in range(total)])  # pyright: ignore
            gram = weight.T @ (grams[role] * (len(weight) / grams[role].trace().clamp(min=1e-30))) @ weight
            leaving = removal_order(moments[role], gram, width=width, count=count, keep=stays).order
            arrays[f"order.{kind}"] = leaving.numpy()
            changes[kind] = []
            for rung in ladders[kind]:
                gone = columns_of(leaving[: total - rung].to(weight.device), width)
                change = torch.zeros_like(weight)
                if len(gone):
                    stay = torch.ones(matrix.cols, dtype=torch.bool, device=weight.device)
                    stay[gone] = False
                    left = stay.nonzero()[:, 0]
                    change[:, left] = (compensate(weight, moments[role], None, left) - weight[:, left]).to(weight.dtype)
                    change[:, gone] = -weight[:, gone]
                changes[kind].append(change)
        for kind, nats in self._errors(changes).items():
            n = len(nats)
            arrays[f"nats.{kind}"] = nats.mean(0)
            arrays[f"stderr.{kind}"] = nats.std(0, ddof=1) / np.sqrt(n) if n > 1 else np.full(nats.shape[1], np.inf)
        return arrays

    def _statistics(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """H [cols, cols] and G [rows, rows] of `o` and `down`, by role."""
        moments, grams = {}, {}
        for role in KINDS.values():
            matrix = self.place.role(role)
            moments[role] = torch.zeros(matrix.cols, matrix.cols, device=self.stream.device)
            grams[role] = torch.zeros(matrix.rows, matrix.rows, device=self.stream.device)
        seen = 0

        def see(flows: Mapping[str, Flow]) -> None:
            nonlocal seen
            for role in KINDS.values():
                flow = flows[self.place.role(role).module]
                x, g = flow.x.float(), flow.g.float()
                moments[role].addmm_(x.T, x)
                grams[role].addmm_(g.T, g)
            seen += len(flows[self.place.role("o").module].x)

        self.pull_all(see, keep=True)
        for role in KINDS.values():
            moments[role] /= seen
            grams[role] /= seen
        return moments, grams

    def _errors(self, changes: Mapping[str, Sequence[Tensor]]) -> dict[str, NDArray[np.float64]]:
        """Prices of each change, in nats per token, one row for each window and draw."""
        rows: dict[str, list[NDArray[np.float64]]] = {kind: [] for kind in changes}

        def see(flows: Mapping[str, Flow]) -> None:
            for kind, role in KINDS.items():
                flow = flows[self.place.role(role).module]
                effects = [((flow.x @ change.T.to(flow.x.dtype)) * flow.g).float().sum(1) for change in changes[kind]]
                squares = 0.5 * torch.stack(effects, 1).double().square()
                rows[kind].append(squares.unflatten(0, (-1, self.length)).mean(1).cpu().numpy())

        self.pull_all(see)
        return {kind: np.concatenate(parts) for kind, parts in rows.items()}


def default_ladder(stream: Stream) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Widths worth a price: 100 to 50 % of the neurons, and every number of key-value groups (at most 8 of them)."""
    place = stream.anatomy.blocks[0]
    neurons = tuple(max(1, round(place.neurons * share)) for share in (1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.6, 0.5))
    if not heads_can_leave(stream.anatomy):
        return neurons, (place.kv_heads,)
    most = place.kv_heads
    return neurons, tuple(sorted({max(1, round(most * k / min(most, 8))) for k in range(1, min(most, 8) + 1)}))
