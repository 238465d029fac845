"""Runs: a recipe becomes a compressed model in a folder, stage by stage, resumable at every moment.

`commands` is what the command line calls; `stages` is the order of work; `folder` keeps what was done.
"""

from .behaviors import check_behaviors
from .commands import (
    apply_plan,
    check_model,
    compare_plans,
    make_model,
    make_report,
    measure_model,
    measure_tasks,
    prepare,
    replan,
    run_recipe,
    score_model,
)
from .stages import check_gates

__all__ = [
    "apply_plan",
    "check_behaviors",
    "check_gates",
    "check_model",
    "compare_plans",
    "make_model",
    "make_report",
    "measure_model",
    "measure_tasks",
    "prepare",
    "replan",
    "run_recipe",
    "score_model",
]
