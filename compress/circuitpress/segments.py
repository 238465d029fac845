"""How matrices are cut for the planner: whole, by unit, or around protected units.

`matrix` makes every matrix one group. `unit` cuts q, k, v along rows and o along columns by key-value group, gate
and up along rows and down along columns by blocks of neurons; the neurons of a layer are first sorted by importance,
so that a block holds neurons of a kind (permuting gate, up and down together does not change the function).
`split_protected` starts from priced matrices and cuts out the rows and columns of protected units.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from .anatomy import Anatomy, Block, Matrix
from .formats import parse
from .units import Axis, Group, Prices, Segment, UnitId

Granularity = Literal["matrix", "unit"]


def whole(matrix: Matrix, layer: int) -> Group:
    """The group of one undivided matrix."""
    segment = Segment(matrix.module, "rows", 0, matrix.rows, matrix.rows, matrix.cols)
    return Group(matrix.module, layer, (segment,))


def cut(matrix: Matrix, axis: Literal["rows", "cols"], start: int, stop: int) -> Segment:
    """The rows or columns from `start` to `stop` of a matrix."""
    rows = stop - start if axis == "rows" else matrix.rows
    cols = stop - start if axis == "cols" else matrix.cols
    return Segment(matrix.module, axis, start, stop, rows, cols)


def groups_of(block: Block, granularity: Granularity, *, neuron_block: int = 64) -> tuple[Group, ...]:
    """The planner's groups of one block.

    `neuron_block` is the number of neurons in a block of neurons, and the least width of a run of columns of `o`.
    """
    if granularity == "matrix":
        return tuple(whole(matrix, block.index) for matrix in block.matrices)
    result = []
    for matrix in block.matrices:
        axis = "cols" if matrix.role in ("o", "down") else "rows"
        for start, stop, units in _unit_spans(block, matrix, neuron_block):
            segment = cut(matrix, axis, start, stop)
            result.append(Group(str(segment), block.index, (segment,), units))
    return tuple(result)


def _unit_spans(block: Block, matrix: Matrix, neuron_block: int) -> Iterable[tuple[int, int, tuple[UnitId, ...]]]:
    share = block.heads // block.kv_heads
    widths = {"q": share * block.head_dim, "o": share * block.head_dim, "k": block.head_dim, "v": block.head_dim}
    if matrix.role in widths:
        width = widths[matrix.role]
        # A run of columns narrower than a scale group pays for a scale of its own: 1.1 bits at 16 columns.
        step = -(-neuron_block // width) if matrix.role == "o" else 1
        for g in range(0, block.kv_heads, step):
            units = range(g, min(g + step, block.kv_heads))
            yield g * width, units.stop * width, tuple(UnitId(block.index, "kv_group", i) for i in units)
    elif matrix.role == "qkv":
        width = block.head_dim
        for part in range(3):
            for h in range(block.heads):
                start = (part * block.heads + h) * width
                yield start, start + width, (UnitId(block.index, "head", h),)
    else:
        # The units are sorted neurons: their identity is in Prices.neuron_order, so none is named here.
        for start in range(0, block.neurons, neuron_block):
            yield start, min(start + neuron_block, block.neurons), ()


def split_protected(prices: Prices, units: Sequence[UnitId], anatomy: Anatomy) -> Prices:
    """Cuts the segments of `units` out of matrices that were priced whole; each becomes a group named `...:protected`.

    Bytes are exact. The price of a matrix is shared by number of weights, since its parts were not priced apart.
    Protected neurons are moved to the front of their layer (`neuron_order`). ValueError for a unit that does not exist,
    and for prices by unit.
    """
    order = dict(prices.neuron_order)
    parts: dict[str, list[Group]] = {}
    for layer in sorted({unit.layer for unit in units}):
        if not 0 <= layer < len(anatomy.blocks):
            raise ValueError(f"layer {layer} does not exist: the model has layers 0 to {len(anatomy.blocks) - 1}")
        block = anatomy.blocks[layer]
        mine = [unit for unit in units if unit.layer == layer]
        neurons = sorted(unit.index for unit in mine if unit.kind == "neuron")
        if neurons:
            rest = np.setdiff1d(np.arange(block.neurons), neurons)
            order[layer] = np.concatenate([np.array(neurons, dtype=np.int64), rest])
        for matrix in block.matrices:
            taken = _protected_runs(block, matrix, mine, len(neurons))
            if taken:
                parts[matrix.module] = _cut_out(matrix, layer, taken)
    whole_ones = {group.name for group in prices.groups}
    if stranger := next((module for module in parts if module not in whole_ones), None):
        raise ValueError(f"{stranger} was not priced as a whole: only whole matrices can be cut")
    groups, rows, shares = [], [], []
    for i, group in enumerate(prices.groups):
        for part in parts.get(group.name, [group]):
            groups.append(part)
            rows.append(i)
            shares.append(part.numel / group.numel)
    share = np.array(shares)[:, None]
    nbytes = [
        [sum(parse(f).nbytes(s.rows, s.cols) for s in group.segments) for f in prices.formats] for group in groups
    ]
    return replace(
        prices,
        groups=tuple(groups),
        nbytes=np.array(nbytes, dtype=np.int64),
        nats=prices.nats[rows] * share,
        nats_sequence=prices.nats_sequence[rows] * share,
        stderr=prices.stderr[rows] * share,
        neuron_order=order,
    )


def name_units(prices: Prices, units: Sequence[UnitId], anatomy: Anatomy) -> Prices:
    """Whole matrices, each with those of `units` whose weights it holds; ValueError for a unit that does not exist."""
    owners: dict[str, list[UnitId]] = {}
    for unit in units:
        if not 0 <= unit.layer < len(anatomy.blocks):
            raise ValueError(f"layer {unit.layer} does not exist: the model has layers 0 to {len(anatomy.blocks) - 1}")
        block = anatomy.blocks[unit.layer]
        for role in unit_weights(block, [unit]):
            owners.setdefault(block.role(role).module, []).append(unit)
    groups = tuple(replace(group, units=tuple(sorted(owners.get(group.name, ())))) for group in prices.groups)
    return replace(prices, groups=groups)


def unit_weights(block: Block, units: Sequence[UnitId]) -> dict[str, tuple[Axis, tuple[int, ...]]]:
    """Role of a matrix -> axis and indices of the rows (columns of `o` and `down`) that protecting `units` keeps.

    A head counts the keys and values it reads as its own, as `split_protected` does. ValueError for a unit that does
    not exist or owns no weights.
    """
    found: dict[str, tuple[Axis, tuple[int, ...]]] = {}
    neurons = tuple(sorted(unit.index for unit in units if unit.kind == "neuron"))
    for matrix in block.matrices:
        runs = _protected_runs(block, matrix, units, len(neurons))
        inside = matrix.role in ("gate", "up", "down")
        indices = neurons if inside else tuple(sorted({i for start, stop in runs for i in range(start, stop)}))
        if indices:
            found[matrix.role] = ("cols" if matrix.role in ("o", "down") else "rows", indices)
    return found


def _protected_runs(
    block: Block, matrix: Matrix, units: Sequence[UnitId], neurons: int
) -> dict[tuple[int, int], list[UnitId]]:
    """Spans of rows (columns for o and down) that belong to `units`, with the units that claim them."""
    share, width = block.heads // block.kv_heads, block.head_dim
    runs: dict[tuple[int, int], list[UnitId]] = {}

    def claim(start: int, unit: UnitId) -> None:
        runs.setdefault((start, start + width), []).append(unit)

    for unit in units:
        if unit.kind not in ("head", "kv_group", "neuron"):
            raise ValueError(f"{unit} cannot be protected: only heads, key-value groups and neurons own weights")
        limit = {"head": block.heads, "kv_group": block.kv_heads, "neuron": block.neurons}[unit.kind]
        if not 0 <= unit.index < limit:
            raise ValueError(f"{unit} does not exist: layer {block.index} has {limit} of kind {unit.kind}")
        if unit.kind == "neuron":
            continue
        heads = [unit.index] if unit.kind == "head" else range(unit.index * share, (unit.index + 1) * share)
        for head in heads:
            if matrix.role in ("q", "o"):
                claim(head * width, unit)
            elif matrix.role in ("k", "v"):
                claim(head // share * width, unit)
            elif matrix.role == "qkv":
                for part in range(3):
                    claim((part * block.heads + head) * width, unit)
    if neurons and matrix.role in ("gate", "up", "down"):
        runs[0, neurons] = [unit for unit in units if unit.kind == "neuron"]
    return runs


def _cut_out(matrix: Matrix, layer: int, runs: dict[tuple[int, int], list[UnitId]]) -> list[Group]:
    axis: Literal["rows", "cols"] = "cols" if matrix.role in ("o", "down") else "rows"
    end = matrix.cols if axis == "cols" else matrix.rows
    kept, rest, at = [], [], 0
    for start, stop in sorted(runs):
        if start > at:
            rest.append(cut(matrix, axis, at, start))
        kept.append(cut(matrix, axis, start, stop))
        at = stop
    if at < end:
        rest.append(cut(matrix, axis, at, end))
    units = tuple(sorted({unit for claimed in runs.values() for unit in claimed}))
    protected = Group(f"{matrix.module}:protected", layer, tuple(kept), units)
    return [protected, Group(matrix.module, layer, tuple(rest))] if rest else [protected]
