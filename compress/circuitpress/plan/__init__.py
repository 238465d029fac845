"""The planner: which group gets which format, so that a byte budget costs the fewest nats. numpy and scipy, no torch.

`make_plan` turns prices, a budget and rules into a plan; `improve` swaps formats by measuring whole plans around it;
`pareto` shows what other budgets would cost; `Curve` corrects the sum of prices by measured probes; `diff` compares two
plans. A new rule is a `Constraint`, never a new solver.
"""

from .budget import Budget
from .constraints import Constraint, cap
from .correction import Curve
from .difference import Difference, diff
from .latency import LatencyTable, TimeLimit
from .make import Problem, make_plan, pose, write_plan
from .pareto import Point, pareto, thin
from .solve import Solution, solve
from .swaps import Measure, Swaps, improve

__all__ = [
    "Budget",
    "Constraint",
    "Curve",
    "Difference",
    "LatencyTable",
    "Measure",
    "Point",
    "Problem",
    "Solution",
    "Swaps",
    "TimeLimit",
    "cap",
    "diff",
    "improve",
    "make_plan",
    "pareto",
    "pose",
    "solve",
    "thin",
    "write_plan",
]
