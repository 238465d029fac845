"""Embedding and lm_head beside the decoder blocks: which formats they may take, and both tables in one.

Budgets in bits per weight or percent count the linear weights of the decoder blocks alone, as everybody's figures do.
Under them embedding and lm_head have one format, that of the recipe: were they on offer, the solver would spend freely
where nobody counts. A budget for all weight files counts them, so there they are options like any others.
"""

from dataclasses import replace

import numpy as np

from ..errors import RecipeError
from ..units import Prices
from .budget import Budget
from .constraints import Constraint

AUTO = "auto"


def outer_on_offer(outer: Prices, form: str, limit: Budget) -> Prices:
    """The table of embedding and lm_head with the formats that they may take under `limit`.

    `form` is a format's complete name, or `auto`: under a budget for files everything that was priced, otherwise the
    format that costs nothing (the checkpoint's own type, or the least that was priced). RecipeError for a format that
    was not priced.
    """
    if form == AUTO and limit.counts_files:
        return outer
    if form == AUTO:
        column = int(np.lexsort((outer.nbytes.sum(0), outer.nats.clip(min=0).sum(0)))[0])
    elif form in outer.formats:
        column = outer.formats.index(form)
    else:
        problem = f"plan.outer: {form} was not priced: there are {', '.join(outer.formats)}"
        raise RecipeError([problem], hint="take one of those, or score again with --restart")
    return _columns(outer, [column])


def join(prices: Prices, outer: Prices) -> Prices:
    """One table of all groups; a format that only one of the tables has is not on offer (inf) in the other."""
    formats = (*prices.formats, *(form for form in outer.formats if form not in prices.formats))
    parts = [_spread(table, formats) for table in (prices, outer)]
    nbytes, nats, sequence, stderr = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    groups = (*prices.groups, *outer.groups)
    return replace(
        prices, groups=groups, formats=formats, nbytes=nbytes, nats=nats, nats_sequence=sequence, stderr=stderr
    )


def widen(rule: Constraint, prices: Prices, joined: Prices) -> Constraint:
    """A rule on the groups and formats of `prices` as a rule on `joined`, where it says nothing of the others."""
    groups, formats = prices.nats.shape
    shape = joined.nats.shape
    if rule.allowed is not None:
        allowed = np.ones(shape, dtype=np.bool_)
        allowed[:groups, :formats] = rule.allowed
        return replace(rule, allowed=allowed)
    assert rule.weights is not None
    weights = np.zeros(shape)
    weights[:groups, :formats] = rule.weights
    return replace(rule, weights=weights)


def _columns(prices: Prices, columns: list[int]) -> Prices:
    cut = {name: getattr(prices, name)[:, columns] for name in ("nbytes", "nats", "nats_sequence", "stderr")}
    return replace(prices, formats=tuple(prices.formats[k] for k in columns), **cut)


def _spread(prices: Prices, formats: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The arrays with a column for each of `formats`; bytes of what is not on offer are those of the heaviest."""
    columns = [formats.index(form) for form in prices.formats]
    shape = (len(prices.groups), len(formats))
    nbytes = np.broadcast_to(prices.nbytes.max(1, keepdims=True), shape).copy()
    nbytes[:, columns] = prices.nbytes
    floats = []
    for array in (prices.nats, prices.nats_sequence, prices.stderr):
        wide = np.full(shape, np.inf)
        wide[:, columns] = array
        floats.append(wide)
    return nbytes, floats[0], floats[1], floats[2]
