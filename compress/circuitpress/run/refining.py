"""The refine stage: makes the applied model better without a byte more, or leaves it as it is and says why."""

import json
import logging
import os
from typing import Any

import torch

from ..errors import CircuitpressError
from ..refine import RECORD, Hold, Lesson, continuations, memory, packed_numel, refine, write_refined
from ..score.ability import behavior_values
from .hessians import prompts
from .keeping import lambdas, level
from .session import Session

HOLD = 10.0
"""Of the lambda that rounding leaned with: nats for a unit of margin that refinement loses. On stories260K's word order
at 2.5 bits 200 steps leave 12.6 of a margin of 15.9 without it, 15.8 with it, and the same KL."""

log = logging.getLogger(__name__)


def refine_model(session: Session) -> None:
    """Refines the session's model as its recipe says and writes refine.json; raises CircuitpressError.

    A model that a killed run had already refined is not refined again.
    """
    settings, folder = session.recipe.refine, session.path / "model"
    record: dict[str, Any] = {"steps": settings.steps}
    if (folder / RECORD).exists():
        record = json.loads((folder / RECORD).read_text())
    elif settings.steps:
        _refuse_too_large(session)
        calibration, held_out, _ = session.windows
        with session.console.progress("refine", settings.steps + 1) as advance:
            windows = calibration.ids
            if settings.written:
                own = continuations(
                    session.checkpoint, windows, count=settings.written, seed=session.recipe.data.seed,
                    device=session.device, advance=advance,
                )  # fmt: skip
                windows = torch.cat([windows, own])
            result = refine(
                folder, session.original, windows, held_out.ids, steps=settings.steps, seed=session.recipe.data.seed,
                lessons=[Lesson(*prompts(kept.watched), kept.weight) for kept in session.kept if kept.weight],
                holds=_holds(session), advance=advance,
            )  # fmt: skip
        record = result.to_json()
        log.info("refined: %s", record)
        write_refined(folder, result.tensors, record)
    session.write("refine.json", record)


def _holds(session: Session) -> list[Hold]:
    """What rounding has leaned to, and refinement is not to spend: the watched margins of the applied model.

    They are higher than the floors, since what fits the watched pairs alone is in them; other pairs have what they have
    only while these hold.
    """
    found, model, result = lambdas(session), session.open(session.path / "model"), []
    for kept in session.kept:
        if share := found.get(kept.name, 0.0):
            dense = behavior_values(session.original, kept.watched)[1]
            aim = max(level(model, kept.watched).margin, kept.keep * float(dense.mean()))
            result.append(Hold(kept.watched, torch.from_numpy(dense).float(), aim, HOLD * share))
    return result


def _refuse_too_large(session: Session) -> None:
    packed = packed_numel(session.path / "model")
    needed = memory(packed, session.anatomy.present_numel - packed + session.anatomy.other_bytes // 2)
    if session.device == "cpu":
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    elif session.device.startswith("cuda"):
        have = torch.cuda.mem_get_info(session.device)[1]
    else:
        return
    if needed > have:
        raise CircuitpressError(
            f"refinement keeps the whole model in memory: {needed / 1e9:.1f} GB, this machine has {have / 1e9:.1f} GB",
            hint="--set refine.steps=0 keeps the codes that rounding chose",
        )
