"""Finds the circuit of a behavior: gradients propose, exact ablation decides.

1. Scores of all nodes or edges by integrated gradients over inputs (`attribution.py`), ranked, those whose sign depends
   on the sample put last (`select.py`).
2. A cut: the given size, or the smallest size along the ranking whose measured faithfulness reaches the target.
3. Around the cut gradients are least to be trusted, so units are ablated there one by one. One outside that would give
   more than the weakest inside takes its place; a random sample from far outside looks for what the gradient missed.
4. Units inside whose removal changes faithfulness by less than `tolerance` are pruned, the least first and several at
   once where they together change it by less; never below the target.

Everything that enters or leaves after step 2 does so on a measured effect: the evidence is causal. What step 3 did not
look at was chosen by its gradient.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...behaviors import Behavior
from ...console import Advance, ignore
from ...stream import Stream
from .attribution import Runs, edge_scores, midpoints, node_scores
from .circuit import Circuit, Granularity
from .graph import Graph, Mask
from .rig import Rig, open_rig
from .select import Ranking, greedy, rank, top

log = logging.getLogger(__name__)

Method = Literal["ig", "attribution"]
Selection = Literal["top", "greedy"]
DRAWN = 20_000
"""Edges up to which a circuit of nodes has its edges scored as well, for the picture."""
TRIES = 8
"""Units outside the cut that are tried in the place of one inside."""


@dataclass(frozen=True)
class Settings:
    """How a circuit is looked for.

    `size` is a number of nodes or edges; without one the smallest circuit that reaches `target` faithfulness is taken.
    `method` ig averages gradients over `steps` midpoints between corrupted and clean inputs, attribution takes the one
    at the clean inputs. `selection` greedy grows a circuit of edges from the logits. `tolerance` is the change of
    faithfulness that counts as none; `window` the number of units on either side of the cut that are ablated.
    """

    granularity: Granularity = "nodes"
    method: Method = "ig"
    steps: int = 5
    selection: Selection = "top"
    size: int | None = None
    target: float = 0.9
    tolerance: float = 0.01
    window: int = 32
    seed: int = 0


def find_circuit(
    stream: Stream,
    behavior: Behavior,
    settings: Settings = Settings(),
    *,
    advance: Advance = ignore,  # noqa: B008
) -> Circuit:
    """The circuit of `behavior`, ablating by resampling from the corrupted prompts.

    CircuitpressError if the behavior has no contrast pairs or the model does not do it.
    """
    with open_rig(stream, behavior) as rig:
        scores, drawn = _scores(rig, settings, advance)
        space = _Space(rig.graph, settings, rank(scores, seed=settings.seed))
        chosen = space.first(settings.size) if settings.size else _smallest(rig, space, settings.target, advance)
        cut = float(rig.faithfulness([space.mask(chosen)])[0])
        before, necessity = len(chosen), {}
        if settings.window:
            chosen = _swap(rig, space, chosen, settings, advance)
            floor = settings.target if settings.size is None else -np.inf
            chosen, necessity = _prune(rig, space, chosen, settings, min(floor, cut), advance)
        reached = float(rig.faithfulness([space.mask(chosen)])[0])
        about = _provenance(rig, settings, space.ranking) | {"size_at_cut": before, "faithfulness_at_cut": cut}
    kept = space.mask(chosen)
    nodes = tuple(rig.graph.nodes[i] for i in chosen) if space.by_nodes else rig.graph.nodes_of(kept)
    if space.by_nodes:
        kept = _between(rig.graph, kept, nodes)
    name = {
        "ig": f"integrated gradients over inputs, {settings.steps} midpoints",
        "attribution": "attribution patching",
    }
    return Circuit(
        rig.graph, settings.granularity, tuple(sorted(nodes, key=rig.graph.sender_index.__getitem__)),
        rig.graph.names(kept), _shorten(space.ranking.score), space.ranking.order, reached, name[settings.method],
        "causal" if settings.window else "gradient", {space.name(i): value for i, value in necessity.items()}, drawn,
        about,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Space:
    """What is chosen among, as indices: of `graph.nodes`, or of all edges in the order of the graph."""

    graph: Graph
    settings: Settings
    ranking: Ranking

    @property
    def by_nodes(self) -> bool:
        return self.settings.granularity == "nodes"

    def first(self, size: int) -> list[int]:
        """The units of the cut at `size`, best first."""
        if self.by_nodes:
            return self.ranking.order[:size].tolist()
        choose = greedy if self.settings.selection == "greedy" else top
        return self._units(choose(self.graph, self.graph.edges, self.ranking, size))

    def mask(self, units: Iterable[int]) -> Mask:
        """The edges that stay."""
        if self.by_nodes:
            return self.graph.edges_of_nodes(self.graph.nodes[i] for i in units)
        rows, columns = np.nonzero(self.graph.edges)
        mask, chosen = np.zeros_like(self.graph.edges), list(units)
        mask[rows[chosen], columns[chosen]] = True
        return mask

    def connected(self, units: Sequence[int]) -> list[int]:
        """Without what lies on no path; nodes always lie on one."""
        return list(units) if self.by_nodes else self._units(self.graph.connected(self.mask(units)))

    def name(self, unit: int) -> str:
        if self.by_nodes:
            return self.graph.nodes[unit]
        row, column = np.argwhere(self.graph.edges)[unit]
        return f"{self.graph.senders[row]}>{self.graph.receivers[column]}"

    def _units(self, mask: Mask) -> list[int]:
        chosen = np.flatnonzero(mask[self.graph.edges])
        return chosen[np.argsort(-np.abs(self.ranking.score[chosen]), kind="stable")].tolist()


def _scores(rig: Rig, settings: Settings, advance: Advance) -> tuple[NDArray[np.float32], NDArray[np.float64] | None]:
    """Scores by prompt of what is chosen among, and the mean ones of all edges where they are known."""
    alphas = midpoints(settings.steps) if settings.method == "ig" else (1.0,)
    graph = rig.graph
    if settings.granularity == "nodes" and graph.edges.sum() > DRAWN:
        return node_scores(rig.stream, graph, rig.behavior, alphas, advance=advance), None
    runs = Runs(rig.parts, rig.reference, tuple(len(ids) for ids in rig.batches), alphas)
    edges = edge_scores(rig.stream, graph, runs, rig.gradients, advance=advance)
    drawn = _shorten(edges[:, graph.edges].mean(0, dtype=np.float64))
    return (edges.sum(2)[:, 1:] if settings.granularity == "nodes" else edges[:, graph.edges]), drawn


def _smallest(rig: Rig, space: _Space, target: float, advance: Advance) -> list[int]:
    """The units at the smallest cut that reaches `target`: sizes 1.25 times apart, then halving. All units reach 1."""
    sizes, count = [1], len(space.ranking.order)
    while sizes[-1] < count:
        sizes.append(min(count, max(sizes[-1] + 1, sizes[-1] * 5 // 4)))
    low = 0
    for at in range(0, len(sizes), 8):
        few = sizes[at : at + 8]
        reached = rig.faithfulness([space.mask(space.first(size)) for size in few], advance=advance) >= target
        if reached.any():
            high = few[int(reached.argmax())]
            low = ([low, *few])[int(reached.argmax())]
            break
        low = few[-1]
    else:
        return space.first(count)
    while high - low > 1:
        middle = (low + high) // 2
        if rig.faithfulness([space.mask(space.first(middle))])[0] >= target:
            high = middle
        else:
            low = middle
    return space.first(high)


def _swap(rig: Rig, space: _Space, chosen: list[int], settings: Settings, advance: Advance) -> list[int]:
    """Exchanges weak units inside for what would give more outside, as long as that helps when both are done."""
    outside = [i for i in space.ranking.order.tolist() if i not in set(chosen)]
    near, far = outside[: settings.window], outside[settings.window :]
    draw = np.random.default_rng(settings.seed).permutation(len(far))[: settings.window]
    tried, weak = [*near, *(far[i] for i in draw)], chosen[-settings.window :]
    masks = [space.mask(chosen), *(space.mask(set(chosen) - {i}) for i in weak)]
    masks += [space.mask([*chosen, i]) for i in tried]
    now, *values = rig.faithfulness(masks, advance=advance).tolist()
    needs = {i: abs(now - value) for i, value in zip(weak, values[: len(weak)], strict=True)}
    gains = sorted(((value - now, i) for i, value in zip(tried, values[len(weak) :], strict=True)), reverse=True)
    for gain, new in gains[:TRIES]:
        # What does nothing alone may be what the new one works with, so each of the weak is tried.
        leaving = [i for i in needs if i in chosen and needs[i] + settings.tolerance < gain]
        changed = [[*(i for i in chosen if i != old), new] for old in leaving]
        after = rig.faithfulness([space.mask(units) for units in changed])
        if not leaving or after.max() < now + settings.tolerance:
            break
        best = int(after.argmax())
        log.debug("%s for %s: faithfulness %.4f to %.4f", space.name(new), space.name(leaving[best]), now, after[best])
        chosen, now = changed[best], float(after[best])
    return chosen


def _prune(
    rig: Rig, space: _Space, chosen: list[int], settings: Settings, floor: float, advance: Advance
) -> tuple[list[int], dict[int, float]]:
    """Drops what does nothing among the weakest; returns also what faithfulness loses without each of the others."""
    start = float(rig.faithfulness([space.mask(chosen)])[0])
    while True:
        looked = chosen[-2 * settings.window :]
        masks = [space.mask(chosen), *(space.mask(set(chosen) - {i}) for i in looked)]
        now, *without = rig.faithfulness(masks, advance=advance).tolist()
        need = {i: now - value for i, value in zip(looked, without, strict=True)}
        idle = sorted((i for i in looked if abs(need[i]) < settings.tolerance), key=lambda i: abs(need[i]))
        rest = chosen
        while idle:
            rest = space.connected([i for i in chosen if i not in idle])
            value = float(rig.faithfulness([space.mask(rest)])[0])
            # All that was pruned so far may together change no more than one unit that does nothing.
            if rest and value >= floor and abs(value - start) < settings.tolerance:
                break
            idle = idle[: len(idle) // 2]
        if not idle:
            return chosen, need
        chosen = rest


def _between(graph: Graph, kept: Mask, nodes: Sequence[str]) -> Mask:
    """Of the edges out of `nodes` (and the embedding) those into one of them or into the logits."""
    rows = {graph.sender_index[name] for name in nodes}
    reads = np.array([not owners or bool(rows & set(owners)) for owners in graph.owners])
    return kept & reads[None]


def _provenance(rig: Rig, settings: Settings, ranking: Ranking) -> dict[str, Any]:
    return {
        "model": str(rig.stream.anatomy.folder),
        "behavior": rig.behavior.name,
        "metric": rig.behavior.metric,
        "pairs": len(rig.behavior),
        "prompts": rig.behavior.provenance,
        "ablation": f"{rig.ablation}, {settings.granularity}, all positions",
        "metric_whole": float(rig.whole.mean()),
        "metric_empty": float(rig.empty.mean()),
        "sure": ranking.sure,
        "settings": asdict(settings),
    }


def _shorten(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Six significant digits, which is all there is in float32: rankings of a million edges stay readable files."""
    return np.array([float(f"{value:.6g}") for value in values.tolist()])
