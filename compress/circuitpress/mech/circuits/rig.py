"""A behavior set up for measuring circuits: the metric of the model with everything outside a circuit ablated.

    m(M)  the whole model        m(0)  everything ablated        m(C)  all but the circuit ablated
    faithfulness f(C) = (m(C) - m(0)) / (m(M) - m(0))

(Marks et al., arXiv 2403.19647; Mueller et al., arXiv 2504.13151). m is the mean of the metric over the prompts. f is 1
where the circuit does what the model does, 0 where it does nothing, and above 1 where it leaves out parts that work
against the behavior. Evidence: causal. What f is depends on what replaces the ablated parts, on whether nodes or edges
are ablated and on the prompts (Miller et al., arXiv 2407.08734): all of it is reported with every number.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...behaviors import Behavior, Pairs
from ...console import Advance, ignore
from ...errors import CircuitpressError
from ...score.metrics import metric_gradients, metric_values
from ...score.walk import own_reference
from ...stream import Stream
from .graph import Graph, Mask, graph_of
from .parts import Ablation, Parts, record, reference
from .patch import check_engine, run_patched, variant


@dataclass(frozen=True, eq=False)
class Rig:
    """A model, a behavior and the values that ablated parts take; `whole` and `empty` are m(M) and m(0) by prompt [n].

    `known` are the whole model's logits, where the metric compares with them.
    """

    stream: Stream
    graph: Graph
    behavior: Behavior
    ablation: Ablation
    batches: tuple[Tensor, ...]
    parts: Parts
    reference: Parts
    known: Tensor | None
    whole: NDArray[np.float64]
    empty: NDArray[np.float64]

    def measure(self, kept: Sequence[Mask], *, advance: Advance = ignore) -> NDArray[np.float64]:
        """The metric by prompt [circuits, n] with only the edges of each mask left as they are."""
        variants = [variant(self.graph, self.graph.edges & ~mask) for mask in kept]
        runs = run_patched(self.stream, self.graph, self.batches, self.reference, variants, advance=advance)
        rows = [metric_values(self.stream, self.behavior, final, reference=self.known) for final in runs]
        return np.stack(rows) if rows else np.zeros((0, len(self.whole)))

    def faithfulness(self, kept: Sequence[Mask], *, advance: Advance = ignore) -> NDArray[np.float64]:
        """f of each mask of kept edges [circuits]."""
        return self.share(self.measure(kept, advance=advance))

    def share(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """(mean over prompts of values [..., n] - m(0)) / (m(M) - m(0))."""
        low = self.empty.mean()
        return np.asarray((values.mean(-1) - low) / (self.whole.mean() - low))

    def gradients(self, final: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the metric at the final hidden states of all micro-batches."""
        return metric_gradients(self.stream, self.behavior, final, reference=self.known)


@contextlib.contextmanager
def open_rig(stream: Stream, behavior: Behavior, ablation: Ablation = "resample") -> Iterator[Rig]:
    """Runs both kinds of prompts and proves that the engine patches this model right.

    CircuitpressError for a behavior without contrast pairs, and for one whose corrupted prompts do not change the
    metric: there is nothing to find.
    """
    pairs = behavior.pairs
    if not isinstance(pairs, Pairs):
        raise CircuitpressError(
            f"behavior {behavior.name!r} has sentences: good and bad are scored from where they begin to differ, so "
            "neither is a corrupted prompt whose values could take the place of ablated parts",
            hint="write contrast pairs (clean, corrupted, answer, wrong), or take a behavior that has them: "
            "circuitpress circuit find MODEL --behavior recipes/behaviors/builtin.yaml --name induction --out DIR",
        )
    graph = graph_of(stream.anatomy)
    clean, corrupted = stream.batches(pairs.clean), stream.batches(pairs.corrupted)
    check_engine(stream, graph, pairs.clean[:1], pairs.corrupted[:1])
    parts, states = record(stream, clean, "circuit-clean")
    ablated, below = record(stream, corrupted, "circuit-corrupted")
    known = own_reference(stream, behavior, states)
    try:
        whole = metric_values(stream, behavior, states, reference=known)
        if ablation != "resample":
            ablated.clear()
            ablated = reference(stream, corrupted, pairs.position, ablation)
            (below,) = run_patched(stream, graph, clean, ablated, [variant(graph, graph.edges)])
        empty = metric_values(stream, behavior, below, reference=known)
        _refuse_no_difference(behavior, whole, empty)
        yield Rig(stream, graph, behavior, ablation, tuple(clean), parts, ablated, known, whole, empty)
    finally:
        parts.clear()
        ablated.clear()


def _refuse_no_difference(behavior: Behavior, whole: NDArray[np.float64], empty: NDArray[np.float64]) -> None:
    gap = whole - empty
    spread = float(gap.std(ddof=1)) / len(gap) ** 0.5 if len(gap) > 1 else 0.0
    if not float(gap.mean()) > 2 * spread:
        raise CircuitpressError(
            f"behavior {behavior.name!r}: the metric is {whole.mean():.3g} on clean prompts and {empty.mean():.3g} "
            f"with everything ablated, over {len(gap)} pairs: there is no effect to find a circuit for",
            hint="see what the model can do with `circuitpress check MODEL --behaviors FILE`, or give more pairs",
        )
