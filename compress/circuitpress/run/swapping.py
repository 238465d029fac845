"""The swap stage: plans around the solver's are measured on held-out text, and better ones take its place.

The search is `plan.improve`; here its measurements are made, as variants of one walk each, and written down. A stage of
its own, since a plan takes a second and this takes minutes: `circuitpress plan` can be asked for many budgets, swaps
are for the one that is applied. It starts from the prices, never from a plan.json that may be swapped already.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..console import Advance
from ..plan import Measure, Problem, Swaps, improve, solve, write_plan
from .planning import block_prices, correction, digest_plan, pose_problem, with_drops

if TYPE_CHECKING:
    import torch

    import circuitpress.run.session

TOKENS = 6144
"""Held-out tokens that moves are measured on, and as many others for swaps: paired differences need fewer than a KL."""


def swap(session: "circuitpress.run.session.Session") -> None:
    """Improves plan.json by measured swaps and writes what was measured to swaps.json."""
    problem = pose_problem(block_prices(session), session, session.outer)
    curve = correction(session)
    solution = solve(problem.prices, problem.constraints)
    plan = with_drops(write_plan(problem, solution, curve=curve), session)
    found = Swaps(solution.choice, None, None, 0, ())
    if session.recipe.plan.swaps > 0 and len(session.windows[1].ids) > 1:
        with session.console.progress("swap", 4 * session.anatomy.work) as advance:
            explore, confirm = (measurer(session, problem, half, advance) for half in _halves(session))
            most = session.recipe.plan.swaps
            found = improve(problem.prices, problem.constraints, solution.choice, explore, confirm, most=most)
    document = {
        "plan": digest_plan(plan),
        "measured": found.measured,
        "start_kl": found.start_kl,
        "kl": found.kl,
        "rounds": list(found.rounds),
    }
    if found.start_kl and found.kl and not np.array_equal(found.choice, solution.choice):
        rows = np.arange(len(found.choice))
        nats = float(problem.prices.nats.clip(min=0)[rows, found.choice].sum())
        swapped = write_plan(problem, replace(solution, choice=found.choice, nats=nats))
        # The curve knows the front, which this plan leaves for a dearer sum; what it gains was measured.
        expected = None if curve is None else curve(solution.nats) * found.kl / found.start_kl
        provenance = plan.provenance | {"swaps": {key: document[key] for key in ("measured", "start_kl", "kl")}}
        plan = with_drops(replace(swapped, predicted_kl_corrected=expected, provenance=provenance), session)
    plan.save(session.path / "plan.json")
    session.write("swaps.json", document)


def _halves(session: "circuitpress.run.session.Session") -> "tuple[torch.Tensor, ...]":
    """Two disjoint sets of held-out windows."""
    held_out = session.windows[1].ids
    return held_out[: 2 * max(1, TOKENS // held_out.shape[1])].tensor_split(2)


def measurer(
    session: "circuitpress.run.session.Session", problem: Problem, windows: "torch.Tensor", advance: Advance
) -> Measure:
    """Measures choices of a problem as whole plans on `windows`."""
    from ..probe import outer_edits, plan_edits
    from ..rounding import context
    from ..score.variants import measure_windows

    calibration, saliency = session.windows[0], session.path / "pricing"
    polish = session.recipe.quantize.polish

    def measure(choices: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float64]]:
        plans = {str(k): problem.decide(choice) for k, choice in enumerate(choices)}
        edits = plan_edits(
            session.stream, plans, calibration=calibration.ids, saliency=saliency, orders=problem.prices.neuron_order,
            polish=polish,
        )  # fmt: skip
        found = measure_windows(
            session.stream, windows, edits, outer=outer_edits(session.stream, plans, saliency=saliency),
            context=context(calibration.ids, saliency), advance=advance,
        )  # fmt: skip
        return [found[str(k)] for k in range(len(choices))]

    return measure
