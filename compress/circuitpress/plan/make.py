"""From prices and a budget to a plan: rules become constraints, the solver chooses, the choice becomes decisions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from ..errors import RecipeError
from ..menu import TARGETS, refuse_formats
from ..units import OUTER, Decision, Plan, Prices
from .budget import Budget
from .constraints import Constraint, matching, rules
from .constraints import budget as budget_rule
from .correction import Curve
from .latency import LatencyTable, TimeLimit, time_rule
from .outside import AUTO, join, outer_on_offer, widen
from .solve import Solution, solve
from .targets import target_rules


@dataclass(frozen=True, eq=False)
class Problem:
    """Everything that the solver is asked: the table of all groups, the rules, and what a plan records of them."""

    prices: Prices
    constraints: tuple[Constraint, ...]
    protected: NDArray[np.bool_]
    budget: str
    target: str
    other_bytes: int

    def decide(self, choice: NDArray[np.int64]) -> tuple[Decision, ...]:
        """The decisions of a choice, one column for each group."""
        prices, nats = self.prices, self.prices.nats.clip(min=0)
        return tuple(
            Decision(group, prices.formats[j], int(prices.nbytes[i, j]), float(nats[i, j]), bool(self.protected[i]))
            for i, (group, j) in enumerate(zip(prices.groups, choice.tolist(), strict=True))
        )


def pose(
    prices: Prices,
    *,
    budget: str,
    target: str = "native",
    protect: Sequence[str] = (),
    floors: Mapping[int, float] = MappingProxyType({}),
    other_bytes: int,
    constraints: Sequence[Constraint] = (),
    outer: Prices | None = None,
    outer_format: str = AUTO,
    latencies: LatencyTable | None = None,
) -> Problem:
    """The problem of a plan within `budget` (`3.0bpw`, `40%`, `900MB`, or `12ms@batch1` by the times in `latencies`).

    `protect` names units, layers or modules that keep the best format (see `constraints.matching`); `floors` maps a
    layer to its least nominal bits; `constraints` adds rules of any kind. `outer` are the prices of embedding and
    lm_head and `outer_format` what they may be (see `outside`). `target` is the runtime (see `targets`; its groups are
    those of `targets.fit`). `other_bytes` are all bytes of neither table. Raises
    RecipeError for a faulty option.
    """
    if problems := refuse_formats(target, prices.formats):
        again = f"score again with --set plan.target={target}, which prices its formats"
        raise RecipeError(problems, hint=again if target in TARGETS else "pass one of them")
    limit = Budget.parse(budget)
    table = prices if outer is None else join(prices, outer_on_offer(outer, outer_format, limit))
    time = TimeLimit.parse(budget)
    if time is not None and latencies is None:
        hint = "circuitpress bench kernels MODEL --save FILE, then --latencies FILE (plan.latencies in a recipe)"
        raise RecipeError([f"plan.budget: {budget} is a time, and there is no table of times"], hint=hint)
    every = [
        budget_rule(table, limit, other_bytes=other_bytes)
        if time is None or latencies is None
        else time_rule(table, time, latencies),
        *rules(table, protect_patterns=protect, floors=floors),
        *target_rules(table, target),
        *(rule if table is prices else widen(rule, prices, table) for rule in constraints),
    ]
    kept = matching(table.groups, protect) if protect else np.zeros(len(table.groups), dtype=np.bool_)
    return Problem(table, tuple(every), kept, budget, target, other_bytes)


def write_plan(problem: Problem, solution: Solution, *, curve: Curve | None = None) -> Plan:
    """The plan of a solution. `curve` gives the corrected prediction, which is None without it."""
    prices, decisions = problem.prices, problem.decide(solution.choice)
    inside = tuple(entry for entry in decisions if entry.group.layer != OUTER)
    outer = tuple(entry for entry in decisions if entry.group.layer == OUTER)
    return Plan(
        budget=problem.budget,
        target=problem.target,
        decisions=inside,
        linear_bytes=sum(entry.nbytes for entry in inside),
        linear_numel=prices.linear_numel,
        other_bytes=problem.other_bytes + sum(entry.nbytes for entry in outer),
        predicted_kl=solution.nats,
        predicted_kl_corrected=None if curve is None else curve(solution.nats),
        bound_kl=solution.bound,
        neuron_order={layer: tuple(order.tolist()) for layer, order in prices.neuron_order.items()},
        provenance={
            "formats": list(prices.formats),
            "constraints": [f"{rule.name}: {rule.reason}" for rule in problem.constraints],
            "curve": None if curve is None else curve.to_json(),
        },
        outer=outer,
    )


def make_plan(
    prices: Prices,
    *,
    budget: str,
    target: str = "native",
    protect: Sequence[str] = (),
    floors: Mapping[int, float] = MappingProxyType({}),
    other_bytes: int,
    curve: Curve | None = None,
    constraints: Sequence[Constraint] = (),
    outer: Prices | None = None,
    outer_format: str = AUTO,
    latencies: LatencyTable | None = None,
) -> Plan:
    """The cheapest plan of the problem that `pose` describes; InfeasibleBudget if nothing fits."""
    problem = pose(
        prices, budget=budget, target=target, protect=protect, floors=floors, other_bytes=other_bytes,
        constraints=constraints, outer=outer, outer_format=outer_format, latencies=latencies,
    )  # fmt: skip
    return write_plan(problem, solve(problem.prices, problem.constraints), curve=curve)
