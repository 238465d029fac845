"""Plans on what a run watches while it keeps behaviors: half of the pairs of every behavior, and held-out text.

Everything is one walk. A plan that leans (lean.py) is rounded twice, with the gradients of each half of the watched
pairs, and every pair is judged by the rounding that has not seen it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..units import Decision
from .hessians import beside
from .leaning import Floors, Measured

if TYPE_CHECKING:
    import torch

    import circuitpress.lean
    import circuitpress.run.keeping
    import circuitpress.run.session
    import circuitpress.score.variants

TOKENS = 8192
"""Of held-out text: the KL of two roundings of one plan is compared there."""


class Watch:
    """What a session watches. `margins` are those of the original, [pairs] for each behavior."""

    def __init__(self, session: "circuitpress.run.session.Session") -> None:
        from ..score.ability import behavior_values

        self._session, self.kept = session, session.kept
        self.margins = [behavior_values(session.original, kept.watched)[1] for kept in session.kept]

    @property
    def floors(self) -> Floors:
        """What must be left."""
        keep = np.array([kept.keep for kept in self.kept])
        dense = np.array([margins.mean() for margins in self.margins])
        right = np.array([(margins > 0).mean() for margins in self.margins])
        return Floors(keep * dense, keep * right, np.array([kept.of == "margin" for kept in self.kept]), dense)

    @property
    def may_lean(self) -> bool:
        """Whether codes are chosen here: another runtime's rounding knows no lean."""
        from ..plan.targets import rounded_here

        return rounded_here(self._session.recipe.plan.target)

    def respond(self) -> NDArray[np.float64]:
        """The response matrix of the behaviors; writes the gradients that leans need."""
        from ..margins import responses, write_gradients

        session = self._session
        folders = [kept.folder(session.path) / "gradients" for kept in self.kept]
        for kept, folder in zip(self.kept, folders, strict=True):
            write_gradients(session.stream, kept.watched, folder)
        windows = session.windows[0].ids
        return responses(session.stream, folders, calibration=windows, saliency=session.path / "pricing")

    def measure(self, decisions: Sequence[Decision], nats: NDArray[np.float64]) -> Measured:
        """The plan `decisions`, rounded as `apply` would, with lambda `nats` of every behavior."""
        from ..lean import HALVES
        from ..margins import half_of
        from ..probe import outer_edits
        from ..score.metrics import as_decision, metric_values, rows_of
        from ..score.variants import carry

        session = self._session
        held_out = session.windows[1].ids
        text = held_out[: max(1, TOKENS // held_out.shape[1])]
        both = [as_decision(kept.watched) for kept in self.kept]
        halves = HALVES if nats.any() else HALVES[:1]
        plans = {str(half): decisions for half in halves}
        leans = {str(half): leans_of(session.path, self.kept, nats, (half,)) for half in halves}
        outer = outer_edits(session.stream, plans, saliency=session.path / "pricing")
        with _rounded(session, plans, leans) as (edits, context):
            found = carry(
                session.stream, [rows_of(behavior) for behavior in both], text, edits, outer=outer, context=context
            )
        seen = []
        for k, behavior in enumerate(both):
            values = {}
            for name, (states, _) in found.items():
                with outer.get(name, nullcontext)():
                    values[name] = metric_values(session.stream, behavior, states[k])
            # Pairs of one half are judged by the rounding that leans to the other.
            other = [str(halves[(int(half) + 1) % len(halves)]) for half in half_of(behavior)[: len(behavior)]]
            seen.append(np.array([values[name][i] for i, name in enumerate(other)]))
        pairs = np.array([len(margins) for margins in seen])
        spread = np.array([(new - old).std(ddof=1) for new, old in zip(seen, self.margins, strict=True)])
        return Measured(
            margins=np.array([margins.mean() for margins in seen]),
            accuracies=np.array([(margins > 0).mean() for margins in seen]),
            stderr=spread / np.sqrt(pairs),
            kl=float(np.mean([divergence.kl for _, divergence in found.values()])),
        )


def leans_of(
    run: Path, kept: "Sequence[circuitpress.run.keeping.Kept]", nats: Sequence[float] | NDArray[np.float64],
    halves: tuple[int, ...] | None = None,
) -> "list[circuitpress.lean.Lean]":  # fmt: skip
    """What the behaviors pull with lambda `nats`; with the gradients of both halves unless `halves` says less."""
    from ..lean import HALVES, Lean

    pairs = zip(kept, nats, strict=True)
    return [Lean(entry.folder(run) / "gradients", float(share), halves or HALVES) for entry, share in pairs if share]


@contextmanager
def _rounded(
    session: "circuitpress.run.session.Session", plans: Mapping[str, Sequence[Decision]],
    leans: "Mapping[str, Sequence[circuitpress.lean.Lean]]",
) -> "Iterator[tuple[circuitpress.score.variants.Edits, torch.Tensor]]":  # fmt: skip
    """The plans as the session rounds them, and the windows that they have to see."""
    from ..probe import corrected_edits, plan_edits
    from ..rounding import context

    calibration, saliency, quantize = session.windows[0].ids, session.path / "pricing", session.recipe.quantize
    orders = session.prices.neuron_order
    if not quantize.correct:
        yield (
            plan_edits(
                session.stream, plans, calibration=calibration, saliency=saliency, orders=orders,
                polish=quantize.polish, leans=leans,
            ),
            context(calibration, saliency),
        )  # fmt: skip
        return
    with corrected_edits(
        session.stream, plans, calibration=calibration, saliency=saliency, orders=orders, polish=quantize.polish,
        beside=beside(session), leans=leans,
    ) as edits:  # fmt: skip
        yield edits, calibration
