"""Hessians of what a run keeps beside the text: prompts of behaviors, and features that it spares.

A behavior's prompts are walked once, with the positions where it is decided; what they give joins the Hessian of the
text in all rounding, times the recipe's `weight`.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CircuitpressError
from .sparing import feature_hessians

if TYPE_CHECKING:
    import torch

    import circuitpress.behaviors
    import circuitpress.run.keeping
    import circuitpress.run.session

log = logging.getLogger(__name__)

DRAWS = 4
"""Label draws per position: a behavior has few of them."""


def beside(session: "circuitpress.run.session.Session") -> list[tuple[Path, float]]:
    """Folders of Hessians that join those of the text, and their weights."""
    return [*_price_hessians(session), *feature_hessians(session)]


def prompts(behavior: "circuitpress.behaviors.Behavior") -> "tuple[torch.Tensor, torch.Tensor]":
    """The rows of a behavior int64 [rows, length], and at which positions it is decided, bool [rows, length]."""
    import torch

    from ..score.metrics import as_decision, rows_of, sites_of

    decision = as_decision(behavior)
    ids = rows_of(decision)
    sites = sites_of(decision, 0, len(ids))
    positions = torch.zeros_like(ids, dtype=torch.bool)
    positions[sites.row, sites.position] = True
    return ids, positions


def _price_hessians(session: "circuitpress.run.session.Session") -> list[tuple[Path, float]]:
    """Walks every behavior's prompts once for their Hessians: shards, and the weight that each has beside the text."""
    from ..price import has_hessians, price

    found = []
    for kept in session.kept:
        _refuse_unable(session, kept)
        ids, positions = prompts(kept.watched)
        folder = kept.folder(session.path) / "hessians"
        price(session.stream, ids, formats=(), draws=DRAWS, folder=folder, positions=positions)
        if has_hessians(folder):
            found.append((folder, kept.weight))
        else:
            log.warning("%s: rounding does not know it: the Hessians of a model so large are not kept", kept.name)
    return found


def _refuse_unable(session: "circuitpress.run.session.Session", kept: "circuitpress.run.keeping.Kept") -> None:
    from ..score.ability import ability

    able = ability(session.original, kept.watched)
    if able.accuracy <= 0.5:
        raise CircuitpressError(
            f"behavior {kept.name}: the original decides {able.accuracy:.0%} of {able.pairs} pairs right, no better "
            "than a coin: there is nothing to keep",
            hint="take it out of the recipe; circuitpress check MODEL --behaviors FILE says what the model can do",
        )
