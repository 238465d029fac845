"""The comparison, end to end: environments, peers, our side, controls, the judge, the table.

1. Calibration windows are drawn once and written to a file that every peer and our own run read.
2. Each peer runs in its environment (jobs.py); our side runs the product at the peers' real bits (ours.py).
3. Everything is judged on the same test windows against the same float32 reference (judge.py).
4. Rows go to quality.json, the picture to quality.svg; everything is kept in `work`, so a rerun only judges.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..anatomy import Anatomy, read_anatomy
from ..checkpoint import resolve_checkpoint
from ..console import Console
from ..data import load_windows
from ..errors import CircuitpressError, RecipeError
from ..evaluate import fidelity
from ..evaluate.divergence import Divergence
from ..files import write_bytes_atomic
from ..recipe import Recipe
from ..stream import Stream, open_stream
from ..units import Prices
from .controls import UNIFORM, control_plans, measure_controls
from .environments import ENVIRONMENTS, ensure, peers_folder
from .jobs import Outcome, Setting, run_peers
from .judge import check, judge
from .methods import ABSENT, PEERS, settings
from .ours import SCORED, ours, recipe_for
from .plot import draw
from .table import budgets_of, cells, render

Row = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """What to compare, and on what. `tests` maps the name of a test text to its file; lengths are in tokens.

    Without `calibration` the text that comes with circuitpress is taken; without `tests` the calibration text is
    measured on, in windows that nobody calibrates on.

    `budgets` are those of our side in bits per weight; empty: the real bits of the best peers and of AutoRound.
    `python` overrides the interpreter of every environment (nothing is installed then).
    """

    model: str
    calibration: Path | None
    tests: Mapping[str, Path]
    settings: Sequence[Setting]
    work: Path
    peers_folder: Path
    recipe: Recipe | None = None
    budgets: Sequence[float] = ()
    samples: int = 128
    windows: int = 64
    length: int = 256
    threads: int = 1
    timeout: float = 7200.0
    python: Path | None = None
    controls: bool = True


def compare_from_options(
    console: Console, *, model: str, text: Path | None, tests: Sequence[Path], peers: str | None, bits: str,
    groups: str, budgets: Sequence[float], recipe: Path | None, samples: int, windows: int, length: int,
    cache: Path | None, out: Path,
) -> tuple[str, dict[str, Any]]:  # fmt: skip
    """What `bench quality` does: runs the comparison and writes quality.json and quality.svg into `out`."""
    names = [] if peers == "none" else PEERS if peers is None else tuple(peers.split(","))
    chosen = settings(names, _numbers(bits, "--bits"), groups=_numbers(groups, "--groups"))
    comparison = Comparison(
        model, text, {path.name: path for path in tests}, chosen, out / "work", cache or peers_folder(),
        recipe=Recipe.load(recipe, overrides=[f"model={json.dumps(model)}"]) if recipe else None, budgets=budgets,
        samples=samples, windows=windows, length=length,
    )  # fmt: skip
    rows = compare(comparison, console)
    write_bytes_atomic(out / "quality.json", (json.dumps({"rows": rows}, indent=1) + "\n").encode())
    draw(rows, out / "quality.svg")
    document = {"rows": rows, "cells": [asdict(cell) for cell in cells(rows)]}
    return f"{render(rows)}\n\n{out / 'quality.json'}, {out / 'quality.svg'}", document


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise RecipeError([f"{option} {text}: expected numbers such as 2,3,4"], hint="see --help") from error


def compare(comparison: Comparison, console: Console) -> list[Row]:
    """The rows of quality.json for one checkpoint; see the module's text. Raises CircuitpressError."""
    return _Comparing(comparison, console).rows()


class _Comparing:
    """A comparison at work."""

    def __init__(self, comparison: Comparison, console: Console) -> None:
        from transformers import AutoTokenizer

        self.asked, self.console = comparison, console
        self.folder = resolve_checkpoint(comparison.model)
        self.anatomy: Anatomy = read_anatomy(self.folder)
        self.work = comparison.work / self.folder.resolve().name
        self.work.mkdir(parents=True, exist_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        length = min(comparison.length, self.anatomy.context or comparison.length)

        def draw(text: Path | None, samples: int) -> Tensor:
            return load_windows(text, tokenizer, length=length, samples=samples, seed=0, vocab=self.anatomy.vocab).ids

        rest = 0 if comparison.tests else comparison.windows
        drawn = draw(comparison.calibration, comparison.samples + rest)
        if rest and len(drawn) < comparison.samples + rest:  # a short text is shared out
            rest = len(drawn) // 3
        # A larger sample of one seed begins with the smaller one, so these are everybody's windows.
        self.calibration = drawn[: len(drawn) - rest]
        self.tests = {name: draw(path, comparison.windows) for name, path in comparison.tests.items()}
        if not self.tests:
            self.tests = {"the rest of the calibration text": drawn[len(self.calibration) :]}
        if len(self.calibration) < 8:
            raise CircuitpressError(
                f"{len(self.calibration)} windows of {length} tokens to calibrate on, 8 are needed",
                hint="give a longer --text, or a smaller --length",
            )
        self.ids = self.work / "calibration.safetensors"
        save_file({"ids": self.calibration}, self.ids)
        self.length = length

    @property
    def stream(self) -> Stream:
        """The reference, in float32 whatever the size: it is what all are compared with."""
        return open_stream(self.folder, dtype="float32", spill=self.work / "spill")

    def rows(self) -> list[Row]:
        outcomes = self._peers()
        rows = self._judged(outcomes)
        first = next(iter(self.tests))
        budgets = list(self.asked.budgets) or budgets_of([row for row in rows if row["text"] == first])
        recipe = recipe_for(
            self.asked.recipe or Recipe(model=str(self.folder)), self.folder, self.asked.calibration,
            samples=len(self.calibration), length=self.length, uniform=self._uniform(),
        )  # fmt: skip
        if budgets:
            with self.console.progress("circuitpress", len(budgets)) as advance:
                mine = ours(recipe, budgets, work=self.work / "ours", console=self._quiet, advance=advance)
            rows += self._judged(mine)
            if self.asked.controls:
                rows += self._controls(recipe, budgets)
        rows += [self._row(text, _absent(name, why), None) for name, why in ABSENT.items() for text in self.tests]
        return rows

    @property
    def _quiet(self) -> Console:
        """Runs inside this one tell their progress to nobody."""
        return Console(quiet=True, json=False, debug=False)

    def _uniform(self) -> list[str]:
        widths = sorted({setting.bits for setting in self.asked.settings} & {2, 3, 4}) or [2, 3, 4]
        return [UNIFORM.format(bits=bits) for bits in widths]

    def _peers(self) -> list[Outcome]:
        found: list[Outcome] = []
        names = list(dict.fromkeys(setting.environment for setting in self.asked.settings))
        with self.console.progress("peers", len(self.asked.settings)) as advance:
            for name in names:
                mine = [setting for setting in self.asked.settings if setting.environment == name]
                environment = ENVIRONMENTS[name]
                try:
                    python = self.asked.python or ensure(environment, self.asked.peers_folder, advance=advance)
                except CircuitpressError as error:
                    found += [_failed(setting, error.message) for setting in mine]
                    continue
                found += run_peers(
                    mine, self.anatomy, self.ids, environment=environment, python=python, work=self.work,
                    threads=self.asked.threads, timeout=self.asked.timeout, advance=advance,
                )  # fmt: skip
        return found

    def _judged(self, outcomes: Sequence[Outcome]) -> list[Row]:
        """A row for each outcome and text; an outcome whose padding is not silent becomes an error."""
        rows: list[Row] = []
        files: dict[str, Path] = {}
        sound = []
        for number, outcome in enumerate(outcomes):
            try:
                if outcome.weights is not None and outcome.weights.is_file():
                    check(self.anatomy, outcome.weights)
                    files[str(number)] = outcome.weights
                sound.append(outcome)
            except CircuitpressError as error:
                sound.append(_broken(outcome, error.message))
        for text, windows in self.tests.items():
            with self.console.progress(f"judge on {text}", self.stream.depth) as advance:
                found = judge(self.stream, windows, files, advance=advance) if files else {}
            for number, outcome in enumerate(sound):
                result = found.get(str(number))
                if outcome.weights is not None and outcome.weights.is_dir():
                    model = open_stream(outcome.weights, dtype="float32", spill=self.work / "spill")
                    result = fidelity(model, self.stream, windows).divergence
                rows.append(self._row(text, outcome, result))
        return rows

    def _controls(self, recipe: Recipe, budgets: Sequence[float]) -> list[Row]:
        scored = self.work / "ours" / SCORED
        prices = Prices.load(scored / "prices.safetensors")
        stream = self.stream
        offered = prices.provenance["offered"]
        plans, outcomes = control_plans(stream, prices, budgets, self._uniform(), offered=offered)
        rows: list[Row] = []
        calibration = self.calibration[: recipe.data.samples]
        for text, windows in self.tests.items():
            with self.console.progress(f"controls on {text}", stream.depth) as advance:
                found = measure_controls(
                    stream, windows, plans, calibration=calibration, saliency=scored / "pricing", prices=prices,
                    advance=advance,
                )  # fmt: skip
            rows += [self._row(text, outcome, found.get(f"{outcome.method}|{outcome.budget}")) for outcome in outcomes]
            for label in (name for name in found if name.startswith("control:nearest")):
                twin = next(o for o in outcomes if o.method == "control:uniform" and label.endswith(f"|{o.budget}"))
                row = self._row(text, twin, found[label])
                rows.append(row | {"method": "control:nearest"})
        return rows

    def _row(self, text: str, outcome: Outcome, found: Divergence | None) -> Row:
        anatomy = self.anatomy
        other = anatomy.other_bytes if outcome.other_bytes is None else outcome.other_bytes
        return {
            "checkpoint": self.folder.resolve().name,
            "text": text,
            "method": outcome.method,
            "budget": outcome.budget,
            "bits_per_weight": 8 * outcome.linear_bytes / anatomy.linear_numel if found else None,
            "kl": found.kl if found else None,
            "kl_stderr": found.kl_stderr if found else None,
            "perplexity": found.perplexity if found else None,
            "reference_perplexity": found.reference_perplexity if found else None,
            "top1_agreement": found.top1_agreement if found else None,
            "linear_bytes": outcome.linear_bytes if found else None,
            "file_bytes": outcome.linear_bytes + other if found else None,
            "seconds": outcome.seconds,
            "cpu_seconds": outcome.cpu_seconds,
            "settings": dict(outcome.settings),
            "versions": dict(outcome.versions),
            "error": outcome.error if found is None else None,
        }


def _failed(setting: Setting, error: str) -> Outcome:
    return Outcome(setting.method, setting.budget, None, 0, 0.0, 0.0, {"bits": setting.bits}, {}, error)


def _broken(outcome: Outcome, error: str) -> Outcome:
    return replace(outcome, weights=None, error=error)


def _absent(method: str, why: str) -> Outcome:
    return Outcome(method, "", None, 0, 0.0, 0.0, {}, {}, why)
