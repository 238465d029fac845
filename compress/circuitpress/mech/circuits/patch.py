"""Exact patching of edges: many variants of a model's run, each with its own edges carrying reference values.

Receiver r of a variant reads the sum over senders s of c_s where the edge (s, r) is patched and of a_s where it is not:
c_s is what s wrote in the reference run, a_s what it writes in this one, with its own inputs patched already. One walk
up the blocks computes it (path patching as in Goldowsky-Dill et al., arXiv 2304.05969, with all paths at once):

1. Every sender has a default, patched or not, which is what most of its edges are. One stream per variant carries all
   defaults; a circuit of nodes needs nothing else.
2. For senders some of whose edges differ from the default, the difference d_s = +-(c_s - a_s) [rows, length, hidden] is
   kept until the end of the walk. A receiver with differing edges reads stream + sum of their d_s.
3. In a block, receivers with differing edges get their own input through `Split`; all others share the block's.

Variants share a computation up to the block in which they first differ. Kept per token and variant: at most hidden *
(1 + senders with edges of both kinds) numbers. Variants are walked in groups that stay below a limit; every group reads
the weights once. With no edge patched the arithmetic is the model's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...console import Advance, ignore
from ...errors import CheckpointError
from ...stream import Stream
from .graph import Graph, Mask
from .parts import Parts, record
from .split import Part, Slot, Split

LIMIT = 1 << 27
"""Numbers that all variants of one walk may keep: 512 MiB in float32."""


Key = tuple[bytes, bytes, bytes]


@dataclass(frozen=True, eq=False)
class Variant:
    """One choice of patched edges: `default` bool [senders], and which edges differ from it.

    `kept` are the rows of the senders with differing edges; `differs` bool [receivers, kept].
    """

    default: NDArray[np.bool_]
    kept: NDArray[np.int64]
    differs: NDArray[np.bool_]

    def keeps(self, rows: Sequence[int]) -> bool:
        """Whether any of these senders has differing edges."""
        return bool(np.isin(self.kept, rows).any())

    def until(self, rows: int, columns: int) -> Key:
        """What distinguishes variants by their first `rows` senders and `columns` receivers."""
        kept = self.kept[self.kept < rows]
        return self.default[:rows].tobytes(), kept.tobytes(), self.differs[:columns, : len(kept)].tobytes()


def variant(graph: Graph, patched: Mask, *, default: NDArray[np.bool_] | None = None) -> Variant:
    """The cheapest form of a mask of patched edges; `default` forces one, which tests of the engine need."""
    patched = patched & graph.edges
    usual = (2 * patched.sum(1) > graph.edges.sum(1)) if default is None else default
    differs = (patched != usual[:, None]) & graph.edges
    kept = np.flatnonzero(differs.any(1))
    return Variant(usual, kept, differs[kept].T)


@torch.no_grad()
def run_patched(
    stream: Stream, graph: Graph, batches: Sequence[Tensor], reference: Parts, variants: Sequence[Variant],
    *, advance: Advance = ignore,
) -> list[list[Tensor]]:  # fmt: skip
    """What the final norm reads in every variant: for each of `variants`, for each micro-batch [rows, length, hidden].

    `batches` are ids of clean prompts [rows, length]; `reference` holds the values that patched edges carry.
    """
    tokens = sum(ids.numel() for ids in batches) * stream.anatomy.hidden
    result: list[list[Tensor]] = []
    group: list[Variant] = []
    for one in [*variants, None]:
        cost = sum(tokens * (1 + len(other.kept)) for other in [*group, *([one] if one else [])])
        if group and (one is None or cost > LIMIT):
            result += _walk(stream, graph, batches, reference, group, advance)
            group = []
        if one is not None:
            group.append(one)
    return result


def _walk(
    stream: Stream, graph: Graph, batches: Sequence[Tensor], reference: Parts, variants: Sequence[Variant],
    advance: Advance,
) -> list[list[Tensor]]:  # fmt: skip
    """One walk for a group of variants. Those that have not differed so far are one computation."""
    keys = [one.until(1, 0) for one in variants]
    states: dict[Key, list[_State]] = {}
    for key, one in zip(keys, variants, strict=True):
        if key not in states:
            states[key] = [
                _start(one, stream.embed(ids), reference.get("embed", 0, b, stream.device))
                for b, ids in enumerate(batches)
            ]
    for layer in range(stream.depth):
        rows, columns = graph.mlp_of(layer) + 1, graph.receivers_of(layer).stop
        after: dict[Key, list[_State]] = {}
        with stream.block(layer) as module:
            split = Split(stream, module, stream.anatomy.blocks[layer])
            values = [
                [reference.get(site, layer, b, stream.device) for site in ("heads", "mlp")] for b in range(len(batches))
            ]
            for at, one in enumerate(variants):
                before, keys[at] = keys[at], one.until(rows, columns)
                if keys[at] not in after:
                    after[keys[at]] = [
                        _step(graph, split, layer, one, state, *values[b]) for b, state in enumerate(states[before])
                    ]
        states = after
        advance(1, f"block {layer}, {len(states)} of {len(variants)} variants apart")
    return [[_read(one, state, [-1])[0] for state in states[key]] for key, one in zip(keys, variants, strict=True)]


class _State(NamedTuple):
    """How far a variant has come on one micro-batch: the stream of all defaults [rows, length, hidden], and the
    differences d_s of the kept senders so far [k, rows, length, hidden]."""

    stream: Tensor
    kept: Tensor


def _start(one: Variant, clean: Tensor, other: Tensor) -> _State:
    default = bool(one.default[0])
    stream = other.expand_as(clean) if default else clean
    return _keep(one, _State(stream, clean.new_zeros(0, *clean.shape)), [(0, clean - other)])


def _step(graph: Graph, split: Split, layer: int, one: Variant, state: _State, heads: Tensor, mlp: Tensor) -> _State:
    """Moves up one block; `heads` and `mlp` are the reference's z and output of the MLP."""
    columns, rows = graph.receivers_of(layer), graph.heads_of(layer)
    own = [(slot, column) for slot, column in zip(slots(split), columns, strict=False) if one.differs[column].any()]
    inputs = _read(one, state, [column for _, column in own])
    attention = {slot: x for (slot, _), x in zip(own, inputs, strict=True)}
    defaults = torch.from_numpy(one.default[list(rows)].repeat(split.place.head_dim)).to(heads.device)
    with_heads = state

    def read_mlp(z: Tensor, middle: Tensor) -> Tensor:
        nonlocal with_heads
        with_heads = _State(middle, state.kept)
        if one.keeps(rows):
            written = split.write(z - heads)
            with_heads = _keep(one, with_heads, [(row, written[..., h, :]) for h, row in enumerate(rows)])
        return _read(one, with_heads, [columns[-1]])[0]

    rewrite = (lambda z: torch.where(defaults, heads, z)) if bool(defaults.any()) else None
    pieces = split.run(state.stream, attention=attention, z=rewrite, mlp=read_mlp)
    row = graph.mlp_of(layer)
    moved = _State(pieces.middle + (mlp if one.default[row] else pieces.mlp), with_heads.kept)
    return _keep(one, moved, [(row, pieces.mlp - mlp)])


def _read(one: Variant, state: _State, receivers: Sequence[int]) -> list[Tensor]:
    """What receivers read [rows, length, hidden] each."""
    chosen = one.differs[list(receivers), : len(state.kept)]
    if not chosen.any():
        return [state.stream] * len(receivers)
    weight = torch.from_numpy(chosen).to(state.kept.device, state.kept.dtype)
    return list(state.stream + torch.tensordot(weight, state.kept, dims=1))


def _keep(one: Variant, state: _State, written: Sequence[tuple[int, Tensor]]) -> _State:
    """Keeps what differing edges of senders add: `written`, own - reference, where the reference is the default."""
    chosen = [change if one.default[row] else -change for row, change in written if one.keeps([row])]
    return state if not chosen else _State(state.stream, torch.cat([state.kept, torch.stack(chosen)]))


def slots(split: Split) -> list[Slot]:
    """The attention receivers of a block in the order of `Graph.receivers_of`."""
    counts: list[tuple[Part, int]] = [
        ("q", split.place.heads),
        ("k", split.place.kv_heads),
        ("v", split.place.kv_heads),
    ]
    return [(part, index) for part, count in counts for index in range(count)]


@torch.no_grad()
def check_engine(stream: Stream, graph: Graph, clean: Tensor, corrupted: Tensor) -> None:
    """Proves on a prompt and its corruption (ids [1, length] both) that edges of this model are patched.

    1. With the edges out of the embedding patched, every receiver reads another embedding and all else follows: the
       outcome must be the corrupted run. A projection whose input could not be exchanged would show here.
    2. With every second sender patched by default and no edge patched in the end, these senders' differences are kept
       and read by all: the outcome must be the clean run. A part that is not what its sender wrote would show here.
    CheckpointError if not. (That all edges patched give the corrupted run proves less: the logits read them directly.)
    """
    parts, ended = record(stream, [corrupted], "circuit-check")
    _, began = record(stream, [clean], "circuit-check-clean")
    nothing = np.zeros(len(graph.senders), dtype=np.bool_)
    second = np.arange(len(graph.senders)) % 2 == 1
    only = np.zeros_like(graph.edges)
    only[0] = graph.edges[0]
    cases = [variant(graph, only, default=nothing), variant(graph, np.zeros_like(only), default=second)]
    runs = run_patched(stream, graph, [clean], parts, cases)
    parts.clear()
    for run, wanted in zip(runs, (ended, began), strict=True):
        error = float((run[0] - wanted[0]).abs().max() / wanted[0].abs().max())
        # Roundings add up over blocks, but not to the square root of the type's; a missed edge is far above it.
        if not error <= torch.finfo(stream.dtype).eps ** 0.5:
            raise CheckpointError(
                f"self-test of patching failed: a run put together from its parts is {error:.1e} off the model's own",
                hint="circuits of this model would be wrong: report the architecture and the transformers version",
            )
