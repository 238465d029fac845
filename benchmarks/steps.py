"""What each step of the method is worth: all of them together, then one switched off at a time, at equal bytes.

For each checkpoint, at 2.5, 3 and 4 bits per weight, KL on test text of plans that differ from the full method in

| row | difference |
|---|---|
| full | none: every format on offer, polish, Fisher-weighted Hessians; the plan of the solver |
| with swaps | the plan improved by measured swaps |
| with correction | rounded for the inputs behind the rounded prefix (`quantize.correct`) |
| with refinement | codes, scales and norms of the full plan learned together afterwards (`refine`) |
| with correction and refinement | both |
| no trellis, no codebooks, no outliers, no small scales | these formats are not on offer |
| no mixed bits | one format for all matrices: the best of those that fit |
| no trellis, no codebooks, with correction | integers alone, rounded so |
| no Fisher weighting | H = E[x x^T] for rounding; prices as they are |
| no polish | codes as the first pass chose them |
| no rotation | trellis formats without their rotation |

    python benchmarks/steps.py --checkpoint DIR --calibration FILE --test FILE [--out benchmarks/results]

Rows of other checkpoints in the file are kept. `--work` keeps the price shards, so that a stopped run goes on.
"""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import click
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

import circuitpress.formats.trellis as trellis
from circuitpress.apply import apply
from circuitpress.data import load_windows
from circuitpress.evaluate import fidelity
from circuitpress.plan import improve, pose, solve, write_plan
from circuitpress.price import price
from circuitpress.probe import corrected_edits, plan_edits
from circuitpress.refine import continuations, refine, write_refined
from circuitpress.score.variants import measure_windows
from circuitpress.stream import Stream, open_stream
from circuitpress.units import Plan, Prices
from common import load_rows, readable_text, save_results

BUDGETS = (2.5, 3.0, 4.0)
INT = tuple(f"int{bits}g{size}" for bits in (2, 3, 4) for size in (32, 64, 128)) + ("int5g64", "int6g64", "int8g64")
SMALL = tuple(f"int{bits}g{size}s6" for bits in (2, 3, 4, 5) for size in (32, 64))
BOOKS = ("code2g64", "code3g64", "code4g64")
OUTLIERS = ("int2g64s6+0.5%", "int3g64s6+0.5%")
TRELLIS = ("trellis1.5", "trellis2", "trellis2.5", "trellis3", "trellis3.5", "trellis4")
FULL = (*INT, *SMALL, *BOOKS, *OUTLIERS, *TRELLIS)
SWAPS = 40
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One way to work: which formats are on offer and what is switched off."""

    label: str
    formats: Sequence[str] = FULL
    mixed: bool = True
    fisher: bool = True
    polish: bool = True
    rotation: bool = True

    @property
    def rounding(self) -> tuple[bool, bool, bool]:
        """Cases that round alike are measured in one walk."""
        return self.fisher, self.polish, self.rotation


def _without(*names: str) -> tuple[str, ...]:
    return tuple(name for name in FULL if name not in names)


INTEGERS = Case("no trellis, no codebooks", _without(*TRELLIS, *BOOKS))
CASES = (
    Case("full"),
    Case("no trellis", _without(*TRELLIS)),
    Case("no codebooks", _without(*BOOKS)),
    Case("no outliers", _without(*OUTLIERS)),
    Case("no small scales", _without(*SMALL, *OUTLIERS)),
    INTEGERS,
    Case("no mixed bits", mixed=False),
    Case("no Fisher weighting", fisher=False),
    Case("no polish", polish=False),
    Case("no rotation", rotation=False),
)


@dataclass(frozen=True)
class Bench:
    """One checkpoint with its texts and prices."""

    stream: Stream
    prices: Prices
    calibration: Tensor
    held_out: Tensor
    test: Tensor
    work: Path


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--calibration", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--test", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--windows", default=112, show_default=True, help="calibration windows of 256 tokens")
@click.option("--measured", default=64, show_default=True, help="test windows; a quarter as many are held out")
@click.option("--refine", "steps", default=200, show_default=True, help="steps of refinement")
@click.option("--work", type=click.Path(path_type=Path), help="folder that keeps the price shards")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True)
def main(
    checkpoint: Path, calibration: Path, test: Path, windows: int, measured: int, steps: int, work: Path | None,
    out: Path,
) -> None:  # fmt: skip
    """Measures the full method and what is lost without each of its steps."""
    rows = [row for row in load_rows(out / "steps.json") if row["checkpoint"] != checkpoint.name]
    with TemporaryDirectory() as folder:
        bench = _open(checkpoint, calibration, test, windows, measured, work or Path(folder))
        for row in _rows(bench, steps):
            rows.append({"checkpoint": checkpoint.name, **row})
            click.echo("{checkpoint} {budget} {method}: {kl:.5f} at {bits_per_weight:.4f}".format(**rows[-1]))
            save_results(out / "steps.json", rows)


def _open(checkpoint: Path, calibration: Path, test: Path, windows: int, measured: int, work: Path) -> Bench:
    work.mkdir(parents=True, exist_ok=True)
    tokenizer, stream = AutoTokenizer.from_pretrained(checkpoint), open_stream(checkpoint)
    held = measured // 4

    def load(text: Path, samples: int) -> Tensor:
        return load_windows(readable_text(text, tokenizer, work), tokenizer, length=256, samples=samples, seed=0).ids

    calibrated, held_out = load(calibration, windows + held).split([windows, held])
    prices = price(stream, calibrated, formats=FULL, folder=work / "pricing")[1]
    _forget_fisher(work)
    return Bench(stream, prices, calibrated, held_out, load(test, measured), work)


def _forget_fisher(work: Path) -> None:
    """A copy of the price shards in which all tokens weigh the same."""
    (work / "unweighted").mkdir(exist_ok=True)
    for shard in (work / "pricing").glob("*.safetensors"):
        tensors = load_file(shard)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("hessian.")}
        plain = {name: torch.ones_like(t) if name.startswith("saliency.") else t for name, t in tensors.items()}
        save_file(plain, work / "unweighted" / shard.name, metadata={"notes": "{}"})


def _rows(bench: Bench, steps: int) -> Iterator[Row]:
    for rounding in dict.fromkeys(case.rounding for case in CASES):
        alike = [case for case in CASES if case.rounding == rounding]
        plans = {(case.label, bits): plan for case in alike for bits in BUDGETS if (plan := _plan(bench, case, bits))}
        with _rotation(on=alike[0].rotation):
            measured = _measure(bench, alike[0], {f"{label} {bits}": plan for (label, bits), plan in plans.items()})
        for (label, bits), plan in plans.items():
            yield _row(label, bits, plan, measured[f"{label} {bits}"])
    yield from _corrected(bench)
    for bits in BUDGETS:
        yield _swapped(bench, bits)
        for correct in (False, True):
            yield _refined(bench, bits, steps, correct=correct)


def _row(label: str, bits: float, plan: Plan, kl: NDArray[np.float64]) -> Row:
    return {
        "method": label,
        "budget": f"{bits}bpw",
        "bits_per_weight": plan.bits_per_weight,
        "kl": float(kl.mean()),
        "kl_stderr": float(kl.std(ddof=1) / np.sqrt(len(kl))),
    }


@contextlib.contextmanager
def _rotation(*, on: bool) -> Iterator[None]:
    """Without rotation, the trellis code is laid over the weights as they are."""
    if on:
        yield
        return
    same = mock.Mock(side_effect=lambda values, _salt: values)
    with mock.patch.object(trellis, "rotate", same), mock.patch.object(trellis, "unrotate", same):
        yield


def _plan(bench: Bench, case: Case, bits: float) -> Plan | None:
    if not case.mixed:
        return _uniform(bench, bits)
    problem = pose(_offer(bench.prices, case.formats), budget=f"{bits}bpw", other_bytes=0)
    return write_plan(problem, solve(problem.prices, problem.constraints))


def _uniform(bench: Bench, bits: float) -> Plan | None:
    """The one format that fits everywhere and has the least price."""
    best = None
    for name in FULL:
        prices = _offer(bench.prices, [name])
        within = 8 * int(prices.nbytes.sum()) <= bits * bench.stream.anatomy.linear_numel
        if within and (best is None or prices.nats.sum() < best.nats.sum()):
            best = prices
    if best is None:
        return None
    problem = pose(best, budget=f"{bits}bpw", other_bytes=0)
    return write_plan(problem, solve(problem.prices, problem.constraints))


def _offer(prices: Prices, names: Sequence[str]) -> Prices:
    columns = [prices.formats.index(name) for name in names]
    cut = {name: getattr(prices, name)[:, columns] for name in ("nbytes", "nats", "nats_sequence", "stderr")}
    return replace(prices, formats=tuple(names), **cut)


def _measure(
    bench: Bench, case: Case, plans: dict[str, Plan], windows: Tensor | None = None
) -> dict[str, NDArray[np.float64]]:
    edits = plan_edits(
        bench.stream, {label: plan.decisions for label, plan in plans.items()}, calibration=bench.calibration,
        saliency=bench.work / ("pricing" if case.fisher else "unweighted"), orders={}, polish=case.polish,
    )  # fmt: skip
    return measure_windows(bench.stream, bench.test if windows is None else windows, edits, context=bench.calibration)


def _swapped(bench: Bench, bits: float) -> Row:
    problem = pose(bench.prices, budget=f"{bits}bpw", other_bytes=0)
    solution = solve(problem.prices, problem.constraints)

    def plan(choice: NDArray[np.int64]) -> Plan:
        return write_plan(problem, replace(solution, choice=choice))

    def measure(choices: Sequence[NDArray[np.int64]], *, windows: Tensor) -> list[NDArray[np.float64]]:
        plans = {str(k): plan(choice) for k, choice in enumerate(choices)}
        found = _measure(bench, CASES[0], plans, windows)
        return [found[label] for label in plans]

    explore, confirm = (partial(measure, windows=half) for half in bench.held_out.chunk(2))
    found = plan(improve(problem.prices, problem.constraints, solution.choice, explore, confirm, most=SWAPS).choice)
    return _row("with swaps", bits, found, _measure(bench, CASES[0], {"plan": found})["plan"])


def _corrected(bench: Bench) -> Iterator[Row]:
    cases = {"with correction": CASES[0], "no trellis, no codebooks, with correction": INTEGERS}
    plans = {
        (label, bits): plan for label, case in cases.items() for bits in BUDGETS if (plan := _plan(bench, case, bits))
    }
    with corrected_edits(
        bench.stream, {f"{label} {bits}": plan.decisions for (label, bits), plan in plans.items()},
        calibration=bench.calibration, saliency=bench.work / "pricing", orders={},
    ) as edits:  # fmt: skip
        measured = measure_windows(bench.stream, bench.test, edits, context=bench.calibration)
    for (label, bits), plan in plans.items():
        yield _row(label, bits, plan, measured[f"{label} {bits}"])


def _refined(bench: Bench, bits: float, steps: int, *, correct: bool) -> Row:
    plan = _plan(bench, CASES[0], bits)
    assert plan is not None
    model, source = bench.work / "model", bench.stream.anatomy.folder
    shutil.rmtree(model, ignore_errors=True)
    apply(
        bench.stream, plan, bench.calibration, saliency=bench.work / "pricing", shards=bench.work / "shards", out=model,
        correct=correct,
    )  # fmt: skip
    own = continuations(source, bench.calibration, count=2 * len(bench.calibration))
    windows = torch.cat([bench.calibration, own])
    result = refine(model, bench.stream, windows, bench.held_out, steps=steps)
    write_refined(model, result.tensors, result.to_json())
    found = fidelity(open_stream(model), bench.stream, bench.test).divergence
    return {
        "method": "with correction and refinement" if correct else "with refinement",
        "budget": f"{bits}bpw",
        "bits_per_weight": plan.bits_per_weight,
        "kl": found.kl,
        "kl_stderr": found.kl_stderr,
    }


if __name__ == "__main__":
    main()
