"""Errors a user meets: each carries the value, the cause and the next command.

The command line prints `message` and `hint` and leaves with `exit_code`; a traceback appears only with `--debug`.
Exit codes are part of the interface: 1 failure, 2 usage or recipe, 3 infeasible budget, 4 quality gate missed.
"""

from collections.abc import Sequence


class CircuitpressError(Exception):
    """A failure that the user can act on.

    `message` names the value and the cause; `hint` is the next thing to type or to change.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class RecipeError(CircuitpressError):
    """A recipe or an option is wrong; `problems` holds every fault that was found, one line each."""

    exit_code = 2

    def __init__(self, problems: Sequence[str], *, hint: str | None = None) -> None:
        super().__init__("\n".join(problems), hint=hint)
        self.problems = tuple(problems)


class CheckpointError(CircuitpressError):
    """A checkpoint cannot be used: missing or truncated files, NaN weights, an unsupported architecture."""


class InfeasibleBudget(CircuitpressError):
    """No plan fits the budget; `smallest_bits` is the smallest feasible bits per weight, `smallest_bytes` its bytes."""

    exit_code = 3

    def __init__(self, message: str, *, smallest_bits: float, smallest_bytes: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.smallest_bits = smallest_bits
        self.smallest_bytes = smallest_bytes


class QualityGateMissed(CircuitpressError):
    """The compressed model was written, but a quality floor that the user set was not reached."""

    exit_code = 4
