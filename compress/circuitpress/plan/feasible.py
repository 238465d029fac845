"""Whether any plan exists, and if not, which rule is to blame and what the smallest budget would be."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import InfeasibleBudget, RecipeError
from ..units import Prices
from .constraints import Constraint

Bools = NDArray[np.bool_]


def join_masks(prices: Prices, constraints: Sequence[Constraint]) -> Bools:
    """The options [groups, formats] that are on offer and that every mask admits.

    RecipeError names the first rule that leaves a group without any.
    """
    allowed = np.isfinite(prices.nats)
    _refuse_empty(prices, allowed, "its prices are not finite: nothing was priced for it")
    for rule in constraints:
        if rule.allowed is not None:
            allowed = allowed & rule.allowed
            _refuse_empty(prices, allowed, f"{rule.name} ({rule.reason}) rules out what is left")
    return allowed


def refuse_infeasible(prices: Prices, constraints: Sequence[Constraint], allowed: Bools) -> None:
    """Raises InfeasibleBudget for the first cap that is below what the lightest options need."""
    for rule in constraints:
        if rule.weights is None or rule.cap is None:
            continue
        least = _least(rule.weights, allowed)
        if least <= rule.cap:
            continue
        blamed = _blame(prices, constraints, rule)
        names = " and ".join(f"{mask.name} ({mask.reason})" for mask in blamed)
        held = f"; in the way: {names}" if blamed else ""
        if rule.name == "budget":
            raise _infeasible(prices, allowed, f"the budget is too small: {rule.reason}", held, bool(blamed))
        reason = f"{rule.name} ({rule.reason}) cannot be met: it allows {rule.cap:g}, no plan needs less than {least:g}"
        raise _infeasible(prices, allowed, reason, held, bool(blamed), f"allow {rule.name} at least {least:g}")


def caps_clash(prices: Prices, caps: Sequence[Constraint], allowed: Bools, nbytes: int | None) -> InfeasibleBudget:
    """The error for caps that can each be met, but not together; `nbytes` is the smallest plan within the others."""
    names = " and ".join(f"{rule.name} ({rule.reason})" for rule in caps)
    way = f"raise one of {', '.join(rule.name for rule in caps)}"
    return _infeasible(prices, allowed, f"{names} cannot be met together", "", False, way, nbytes)


def _infeasible(
    prices: Prices, allowed: Bools, reason: str, held: str, masked: bool, way: str = "", nbytes: int | None = None
) -> InfeasibleBudget:
    lightest = np.where(allowed, prices.nbytes.astype(np.float64), np.inf).min(1)
    outer = int(lightest[~prices.is_linear].sum())
    nbytes = int(lightest.sum()) if nbytes is None else nbytes
    bits = 8 * (nbytes - outer) / prices.linear_numel
    smallest = f"the smallest plan takes {nbytes:,} bytes, {bits:.4g} bits per weight"
    # Rounded up, so that the number can be typed as it stands.
    way = way or f"pass --budget {math.ceil(bits * 100) / 100:.2f}bpw (plan.budget in a recipe)"
    way += ", or drop that rule" if masked else ", or offer a smaller format in plan.formats"
    return InfeasibleBudget(f"{reason}; {smallest}{held}", smallest_bits=bits, smallest_bytes=nbytes, hint=way)


def _blame(prices: Prices, constraints: Sequence[Constraint], cap: Constraint) -> list[Constraint]:
    """The masks that keep `cap` from being met: each that alone does, all if several must go, none if none helps."""
    masks = [rule for rule in constraints if rule.allowed is not None]
    alone = [mask for mask in masks if _holds(prices, [other for other in masks if other is not mask], cap)]
    return alone or (masks if _holds(prices, [], cap) else [])


def _holds(prices: Prices, masks: Sequence[Constraint], cap: Constraint) -> bool:
    assert cap.weights is not None and cap.cap is not None
    return _least(cap.weights, join_masks(prices, masks)) <= cap.cap


def _least(weights: NDArray[np.float64], allowed: Bools) -> float:
    return float(np.where(allowed, weights, np.inf).min(1).sum())


def _refuse_empty(prices: Prices, allowed: Bools, cause: str) -> None:
    empty = np.flatnonzero(~allowed.any(1))
    if len(empty):
        name = prices.groups[empty[0]].name
        problem = f"no format is left for {name}: {cause}"
        raise RecipeError([problem], hint="offer more formats in plan.formats, or relax that rule")
