"""The single checks of `verify`, each as a frozen value with what it measured; all are shares of m(M) - m(0)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ...console import Advance, ignore
from .circuit import Circuit
from .graph import Graph, Mask, heads_by_layer
from .rig import Rig

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Sizes of circuits, as shares of all nodes or edges, at which the curves are measured (those of MIB)."""
MOST = 64
"""Units whose necessity is measured: of a larger circuit, the ones that score lowest."""
RESAMPLES = 1000


@dataclass(frozen=True)
class Units:
    """What a circuit is made of, by name, and the edges that stay when only some units do."""

    graph: Graph
    by_nodes: bool
    every: tuple[str, ...]
    circuit: tuple[str, ...]

    @classmethod
    def of(cls, circuit: Circuit) -> "Units":
        """The units of a circuit, those with the largest scores first."""
        graph, by_nodes = circuit.graph, circuit.granularity == "nodes"
        every = graph.nodes if by_nodes else tuple(f"{s}>{r}" for s, r in graph.names(graph.edges))
        inside = set(circuit.nodes if by_nodes else (f"{s}>{r}" for s, r in circuit.edges))
        return cls(graph, by_nodes, every, tuple(every[i] for i in circuit.order if every[i] in inside))

    def mask(self, names: Iterable[str]) -> Mask:
        """The edges that stay when the units `names` do."""
        if self.by_nodes:
            return self.graph.edges_of_nodes(names)
        return self.graph.mask((s, r) for s, _, r in (name.partition(">") for name in names))

    def without(self, names: Iterable[str], *, whole: bool = False) -> Mask:
        """The edges of the circuit, or of the whole model, without the units `names`."""
        gone = set(names)
        return self.mask(name for name in (self.every if whole else self.circuit) if name not in gone)


@dataclass(frozen=True)
class Faithfulness:
    """f(C); `low` and `high` hold 95 % of bootstrap resamples of the prompts; `metric` is m(C)."""

    value: float
    low: float
    high: float
    metric: float


@dataclass(frozen=True)
class Subset:
    """A part K of the circuit, and what circuit and model still do without it; complete circuits lose the same."""

    missing: tuple[str, ...]
    circuit: float
    model: float

    @property
    def gap(self) -> float:
        """|f(C without K) - f(M without K)|."""
        return abs(self.circuit - self.model)


@dataclass(frozen=True)
class Need:
    """What faithfulness loses without a unit: `alone` from the whole circuit, `last` once the circuit's other heads of
    the same block are gone (None where there are none)."""

    unit: str
    alone: float
    last: float | None


@dataclass(frozen=True)
class Random:
    """f of circuits of the same size drawn at random; `every` says that all there are were measured."""

    count: int
    every: bool
    mean: float
    std: float
    highest: float
    percentile: float


@dataclass(frozen=True)
class Curve:
    """f at sizes along the ranking, as shares of all units, and the areas: `cpr` under f, `cmd` under |1 - f|."""

    shares: tuple[float, ...]
    sizes: tuple[int, ...]
    faithfulness: tuple[float, ...]
    cpr: float
    cmd: float


@dataclass(frozen=True)
class Group:
    """Heads of one block ablated in the whole model: what is lost, each alone, and all at once."""

    heads: tuple[str, ...]
    single: tuple[float, ...]
    together: float

    @property
    def redundant(self) -> bool:
        """Whether the heads stand in for one another: together they lose at least twice what they lose one by one."""
        return self.together >= 0.1 and self.together >= 2 * sum(self.single)


def faithfulness(rig: Rig, units: Units, *, seed: int) -> Faithfulness:
    """f(C) with its interval over prompts."""
    (values,) = rig.measure([units.mask(units.circuit)])
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, whole = rig.empty[draws].mean(1), rig.whole[draws].mean(1)
    resampled = (values[draws].mean(1) - low) / (whole - low)
    bounds = np.quantile(resampled, [0.025, 0.975])
    return Faithfulness(rig.share(values).item(), float(bounds[0]), float(bounds[1]), float(values.mean()))


def completeness(rig: Rig, units: Units, *, count: int, seed: int, advance: Advance = ignore) -> tuple[Subset, ...]:
    """The whole circuit as K, then `count` random parts of half of its units."""
    rng, members = np.random.default_rng(seed), units.circuit
    half = max(1, len(members) // 2)
    drawn = {tuple(sorted(rng.choice(len(members), half, replace=False).tolist())) for _ in range(count)}
    missing = [members, *(tuple(members[i] for i in chosen) for chosen in sorted(drawn))]
    masks = [units.without(gone) for gone in missing] + [units.without(gone, whole=True) for gone in missing]
    values = rig.faithfulness(masks, advance=advance).tolist()
    return tuple(map(Subset, missing, values[: len(missing)], values[len(missing) :]))


def minimality(rig: Rig, units: Units, *, advance: Advance = ignore) -> tuple[Need, ...]:
    """What each unit is needed for; of more than MOST units, those that score lowest."""
    looked = units.circuit[-MOST:]
    others = {
        head: tuple(other for other in heads if other != head)
        for heads in (heads_by_layer(units.circuit) if units.by_nodes else {}).values()
        for head in heads
        if len(heads) > 1
    }
    masks = [units.mask(units.circuit), *(units.without([unit]) for unit in looked)]
    paired = [unit for unit in looked if unit in others]
    for unit in paired:
        masks += [units.without(others[unit]), units.without([unit, *others[unit]])]
    full, *values = rig.faithfulness(masks, advance=advance).tolist()
    pairs = values[len(looked) :]
    last = {unit: pairs[2 * i] - pairs[2 * i + 1] for i, unit in enumerate(paired)}
    return tuple(Need(unit, full - value, last.get(unit)) for unit, value in zip(looked, values, strict=False))


def at_random(rig: Rig, units: Units, value: float, *, count: int, seed: int, advance: Advance = ignore) -> Random:
    """Circuits of as many units as the circuit has; `percentile` is the share of them below `value`, in per cent."""
    size, total = len(units.circuit), len(units.every)
    every = math.comb(total, size) <= count
    if every:
        chosen = list(combinations(range(total), size))
    else:
        rng = np.random.default_rng(seed)
        chosen = [tuple(rng.choice(total, size, replace=False).tolist()) for _ in range(count)]
    values = rig.faithfulness([units.mask(units.every[i] for i in one) for one in chosen], advance=advance)
    below = 100 * float((values < value).mean())
    return Random(len(chosen), every, float(values.mean()), float(values.std()), float(values.max()), below)


def curve(rig: Rig, units: Units, order: NDArray[np.int64], *, advance: Advance = ignore) -> Curve:
    """f at the sizes of SHARES along `order`, and its areas by the trapezoid rule from nothing to everything."""
    total = len(units.every)
    sizes = sorted({0, *(max(1, round(share * total)) for share in SHARES)})
    masks = [units.mask(units.every[i] for i in order[:size]) for size in sizes]
    values = rig.faithfulness(masks, advance=advance)
    shares = np.array(sizes) / total
    areas = [float(np.trapezoid(y, shares)) for y in (values, np.abs(1 - values))]
    return Curve(tuple(shares.tolist()), tuple(sizes), tuple(values.tolist()), areas[0], areas[1])


def groups(rig: Rig, nodes: Sequence[str], *, advance: Advance = ignore) -> tuple[Group, ...]:
    """For every block with heads in the circuit: these heads, and all heads of the block, where they are several."""
    graph, sets = rig.graph, []
    every = heads_by_layer(graph.nodes)
    for layer, heads in heads_by_layer(nodes).items():
        sets += [heads for heads in dict.fromkeys((heads, every[layer])) if len(heads) > 1]
    everything = set(graph.nodes)

    def left(gone: Iterable[str]) -> Mask:
        return graph.edges_of_nodes(everything - set(gone))

    members = list(dict.fromkeys(head for heads in sets for head in heads))
    masks = [left([head]) for head in members] + [left(heads) for heads in sets]
    lost = (1 - rig.faithfulness(masks, advance=advance)).tolist()
    single = dict(zip(members, lost, strict=False))
    return tuple(
        Group(heads, tuple(single[head] for head in heads), lost[len(members) + i]) for i, heads in enumerate(sets)
    )
