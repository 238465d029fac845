"""Our own side: what `circuitpress run` makes of the same calibration tokens at given budgets.

The product itself is measured, not a shortcut to it: every budget is a run folder with the user's recipe, and the judge
reads the packed model that the run wrote. The windows that a run holds out (for probes, swaps and refinement) come
out of the same tokens that the peers calibrate on: seven eighths are priced, one eighth is held out.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .. import __version__
from ..anatomy import read_anatomy
from ..console import Advance, Console, ignore
from ..errors import CircuitpressError
from ..files import write_bytes_atomic
from ..recipe import Recipe
from ..run import make_model, prepare, replan, run_recipe, score_model
from ..stream import open_stream
from ..units import Plan
from .jobs import Outcome

METHOD = "circuitpress"
SCORED = "scored"
"""The run folder that all budgets start from, and from which the controls take prices and token weights."""


def recipe_for(
    base: Recipe, model: Path, text: Path | None, *, samples: int, length: int, uniform: Sequence[str] = ()
) -> Recipe:
    """`base` on `model`, calibrated and held out on the first `samples` windows of `text` and on nothing else.

    The formats `uniform` are priced too, for the controls, and are no part of the offer.
    """
    held = max(1, samples // 8)
    return base.replace(
        {
            "model": str(model.resolve()),
            "data.calibration": None if text is None else str(text.resolve()),
            # The run's own evaluation is not what is reported; any other text keeps the windows apart.
            "data.test": None,
            "data.samples": samples - held,
            "data.length": length,
            "data.seed": 0,
            "score.exact": 0.0,
            "evaluate.windows": held,
            "plan.probes": [*base.plan.probes, *(name for name in uniform if name not in base.plan.probes)],
        }
    )


def ours(
    recipe: Recipe, budgets: Sequence[float], *, work: Path, console: Console, advance: Advance = ignore
) -> list[Outcome]:
    """One outcome for each of `budgets` in bits per weight. Scoring is done once; finished runs under `work` are kept.

    A budget that no plan fits comes back as an outcome with its error.
    """
    scored = work / SCORED
    spent = _Clock(work / f"{SCORED}.json")
    # Tokenising, the model's own code, its weights: all of that is outside the peers' clocks too.
    prepare(recipe, scored, console)
    open_stream(Path(recipe.model))
    with spent:
        score_model(recipe, scored, console)
    found = []
    for bits in budgets:
        advance(0, f"{METHOD} at {bits:.3f} bits")
        found.append(_run(recipe, scored, spent, bits, work, console))
        advance(1, f"{METHOD} at {bits:.3f} bits")
    return found


def _run(recipe: Recipe, scored: Path, before: "_Clock", bits: float, work: Path, console: Console) -> Outcome:
    budget = f"{bits:.9f}bpw"
    folder = work / f"{bits:.6f}"
    settings = {"formats": list(recipe.plan.formats), "swaps": recipe.plan.swaps, "refine": recipe.refine.steps}
    blank = Outcome(METHOD, f"{bits:.4g} bits", None, 0, 0.0, 0.0, settings, {"circuitpress": __version__})
    if not (folder / "manifest.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(scored, folder)
    clock = _Clock(work / f"{bits:.6f}.json")
    try:
        with clock:
            replan(folder, console, budget=budget, target=None, protect=(), front=False)
            make_model(recipe.replace({"plan.budget": budget}), folder, console)
        run_recipe(recipe.replace({"plan.budget": budget}), folder, console)  # judging it: no part of the peers' work
    except CircuitpressError as error:
        return replace(blank, error=error.message)
    anatomy = read_anatomy(folder / "model", packed_ok=True)
    return replace(
        blank,
        weights=folder / "model",
        linear_bytes=Plan.load(folder / "plan.json").linear_bytes,
        other_bytes=anatomy.file_bytes - anatomy.linear_bytes,
        seconds=before.wall + clock.wall,
        cpu_seconds=before.cpu + clock.cpu,
    )


class _Clock:
    """Wall and CPU seconds of work that may be resumed: what is on file, plus what happens inside the context."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.wall, self.cpu = json.loads(path.read_text()) if path.exists() else (0.0, 0.0)

    def __enter__(self) -> None:
        self._start = time.monotonic(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall += time.monotonic() - self._start[0]
        self.cpu += time.process_time() - self._start[1]
        write_bytes_atomic(self.path, json.dumps([self.wall, self.cpu]).encode())
