"""The planner: which group gets which format, so that a byte budget costs the fewest nats. numpy and scipy, no torch.

`make_plan` turns prices, a budget and rules into a plan; `pareto` shows what other budgets would cost; `Curve` corrects
the sum of prices by measured probes; `diff` compares two plans. A new rule is a `Constraint`, never a new solver.
"""

from .budget import Budget
from .constraints import Constraint
from .correction import Curve
from .difference import Difference, diff
from .make import make_plan
from .pareto import Point, pareto, thin
from .solve import Solution, solve

__all__ = [
    "Budget",
    "Constraint",
    "Curve",
    "Difference",
    "Point",
    "Solution",
    "diff",
    "make_plan",
    "pareto",
    "solve",
    "thin",
]
