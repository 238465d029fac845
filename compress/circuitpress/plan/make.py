"""From prices and a budget to a plan: rules become constraints, the solver chooses, the choice becomes decisions."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from ..errors import RecipeError
from ..units import Decision, Plan, Prices
from .budget import Budget
from .constraints import Constraint, matching, rules
from .constraints import budget as budget_rule
from .correction import Curve
from .solve import solve

TARGETS = ("native",)


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
) -> Plan:
    """The cheapest plan within `budget` (`3.0bpw`, `40%`, `900MB`).

    `protect` names units, layers or modules that keep the best format (see `constraints.matching`); `floors` maps a
    layer to its least nominal bits; `other_bytes` are all bytes that are not linear weights; `constraints` adds rules
    of any kind. `curve` gives the corrected prediction, which is None without it. Raises RecipeError for a faulty
    option and InfeasibleBudget if nothing fits.
    """
    if target not in TARGETS:
        raise RecipeError([f"plan.target: {target!r} is not a target"], hint=f"there is {', '.join(TARGETS)}")
    limit = budget_rule(prices, Budget.parse(budget), other_bytes=other_bytes)
    every = [limit, *rules(prices, protect_patterns=protect, floors=floors), *constraints]
    solution = solve(prices, every)
    kept = matching(prices.groups, protect) if protect else np.zeros(len(prices.groups), dtype=np.bool_)
    nats = prices.nats.clip(min=0)
    decisions = tuple(
        Decision(group, prices.formats[j], int(prices.nbytes[i, j]), float(nats[i, j]), bool(kept[i]))
        for i, (group, j) in enumerate(zip(prices.groups, solution.choice.tolist(), strict=True))
    )
    return Plan(
        budget=budget,
        target=target,
        decisions=decisions,
        linear_bytes=solution.nbytes,
        linear_numel=int(prices.numel.sum()),
        other_bytes=other_bytes,
        predicted_kl=solution.nats,
        predicted_kl_corrected=None if curve is None else curve(solution.nats),
        bound_kl=solution.bound,
        neuron_order={layer: tuple(order.tolist()) for layer, order in prices.neuron_order.items()},
        provenance={
            "formats": list(prices.formats),
            "constraints": [f"{rule.name}: {rule.reason}" for rule in every],
            "curve": None if curve is None else curve.to_json(),
        },
    )
