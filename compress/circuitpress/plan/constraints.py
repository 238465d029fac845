"""What a plan may not do. Every rule is an option mask or a linear cap, so a new rule never changes the solver.

    mask   allowed[i, f] says whether group i may take format f          protection, floors, what a kernel can run
    cap    sum over groups of weights[i, choice[i]] <= cap               bytes, milliseconds, energy

A format's nominal bits are the first number of its name (`int4g64` 4, `bfloat16` 16, `drop` 0): floors speak of the
width of a code, since real bits depend on the shape of a matrix and on the group size.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from ..errors import RecipeError
from ..units import DROP, OUTER, Group, Prices
from .budget import Budget


@dataclass(frozen=True, eq=False)
class Constraint:
    """One rule on n groups x f formats: either `allowed` is given, or `weights` and `cap` are.

    `name` is what an error blames and `reason` says, for people, where the rule comes from. ValueError if both or
    neither kind is given.
    """

    name: str
    reason: str
    allowed: NDArray[np.bool_] | None = None
    weights: NDArray[np.float64] | None = None
    cap: float | None = None

    def __post_init__(self) -> None:
        if (self.weights is None) != (self.cap is None) or (self.allowed is None) == (self.weights is None):
            raise ValueError(f"constraint {self.name!r} needs either `allowed`, or `weights` and `cap`")


def budget(prices: Prices, limit: Budget, *, other_bytes: int) -> Constraint:
    """The byte budget: the linear weights may take `limit.linear_bytes(...)`.

    Embedding and lm_head, where they are among the groups, count in a budget for files and in no other; `other_bytes`
    are then the bytes of all the rest.
    """
    numel = prices.linear_numel
    cap = limit.linear_bytes(numel, other_bytes)
    reason = f"{limit.text} is {cap:,} bytes for {numel:,} linear weights"
    if limit.counts_files:
        also = "" if prices.is_linear.all() else ", embedding and lm_head"
        reason = f"{limit.text} for all weight files leaves {cap:,} bytes for {numel:,} linear weights{also}"
        reason += f" beside {other_bytes:,} of other weights"
        return Constraint("budget", reason, weights=prices.nbytes.astype(np.float64), cap=float(cap))
    weights = np.where(prices.is_linear[:, None], prices.nbytes, 0)
    return Constraint("budget", reason, weights=weights.astype(np.float64), cap=float(cap))


def cap(prices: Prices, name: str, weights: NDArray[np.float64], limit: float, *, reason: str) -> Constraint:
    """A linear cap, such as a latency: `weights` [groups, formats] in any unit, their sum at most `limit`."""
    if weights.shape != prices.nats.shape:
        raise ValueError(f"constraint {name!r} has weights {weights.shape} for prices {prices.nats.shape}")
    return Constraint(name, reason, weights=weights.astype(np.float64), cap=limit)


def floor(prices: Prices, layers: Sequence[int], min_bits: float) -> Constraint:
    """Groups of `layers` take no format below `min_bits` nominal bits; RecipeError for a layer that does not exist."""
    layer = np.array([group.layer for group in prices.groups])
    there = layer[layer != OUTER]
    strangers = sorted(set(layers) - set(there.tolist()))
    if strangers:
        problem = f"plan.floors: layer {strangers[0]} does not exist"
        raise RecipeError([problem], hint=f"the model has layers {there.min()} to {there.max()}")
    enough = np.array([nominal_bits(name) >= min_bits for name in prices.formats])
    allowed = ~np.isin(layer, list(layers))[:, None] | enough
    return Constraint("floor", f"layers {_listed(layers)} not below {min_bits:g} bits", allowed=allowed)


def protect(prices: Prices, patterns: Sequence[str], *, floor: str | None = None) -> Constraint:
    """Groups that `patterns` name keep a good format: `floor` or wider, by default the best that was priced.

    See `matching` for patterns. The best format is the one with the least total price over all groups, then the fewest
    bytes: the checkpoint's own type where it is on offer.
    """
    named = matching(prices.groups, patterns)
    if floor is None:
        good, label = best_option(prices), "the best format on offer"
    else:
        prices.column(floor)
        wide = np.array([nominal_bits(name) >= nominal_bits(floor) for name in prices.formats])
        good, label = np.broadcast_to(wide, prices.nats.shape), f"{floor} or wider"
    return Constraint("protect", f"{', '.join(patterns)} keep {label}", allowed=~named[:, None] | good)


def best_option(prices: Prices) -> NDArray[np.bool_]:
    """One format a group [n, f]: the best of the table, or the group's own best where that one is not on offer."""
    on_offer = np.isfinite(prices.nats)
    nats = np.where(on_offer, prices.nats.clip(min=0), np.inf)
    total = np.where(on_offer, nats, nats.min(1, keepdims=True)).sum(0)
    total[~on_offer.any(0)] = np.inf
    column = np.lexsort((prices.nbytes.sum(0), total))[0]
    choice = np.where(on_offer[:, column], column, np.argmin(nats, axis=1))
    return np.arange(len(prices.formats)) == choice[:, None]


def matching(groups: Sequence[Group], patterns: Sequence[str]) -> NDArray[np.bool_]:
    """Which groups [n] the patterns name.

    A pattern is a layer (`L3`), a unit (`L12.head.7`), or the name of a group or module; units and names may hold
    shell wildcards (`L3.head.*`, `model.layers.0.*`, `*.down_proj`). RecipeError names every pattern that matches
    nothing, with the nearest names there are.
    """
    names = [_names(group) for group in groups]
    hits = {pattern: np.array([_hits(pattern, own) for own in names], dtype=np.bool_) for pattern in patterns}
    problems = []
    for pattern, hit in hits.items():
        if not hit.any():
            known = sorted(set().union(*names))
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5) or known[:3]
            problems.append(f"plan.protect: {pattern!r} matches no unit, layer or module; near it: {', '.join(near)}")
    if problems:
        raise RecipeError(problems, hint="name a unit (L12.head.7), a layer (L3) or modules (model.layers.0.*)")
    return np.logical_or.reduce([np.zeros(len(groups), dtype=np.bool_), *hits.values()])


def nominal_bits(name: str) -> float:
    """The width that a format's name states; ValueError for a name without a number."""
    if name == DROP:
        return 0.0
    match = re.search(r"\d+", name)
    if match is None:
        raise ValueError(f"the name of format {name!r} states no number of bits")
    return float(match[0])


def rules(prices: Prices, *, protect_patterns: Sequence[str], floors: Mapping[int, float]) -> list[Constraint]:
    """The masks that a recipe asks for: protection, and for each layer of `floors` its least nominal bits."""
    result = [protect(prices, protect_patterns)] if protect_patterns else []
    for bits in sorted(set(floors.values())):
        result.append(floor(prices, [layer for layer, least in floors.items() if least == bits], bits))
    return result


def _names(group: Group) -> set[str]:
    modules = {segment.module for segment in group.segments}
    return {group.name, f"L{group.layer}"} | modules | {str(unit) for unit in group.units}


def _hits(pattern: str, names: set[str]) -> bool:
    # Names of segments hold brackets, which fnmatch reads as character classes: equality goes first.
    return pattern in names or any(fnmatchcase(name, pattern) for name in names)


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(str(layer) for layer in sorted(layers))
