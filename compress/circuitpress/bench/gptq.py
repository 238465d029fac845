"""`eval --baseline gptq`: the reference as GPTQModel makes it, at its setting nearest in bytes, beside our model.

1. What a setting stores follows from shapes alone: `bits` a code, and for every group of columns of a row a scale of 16
   bits and a zero point of `bits`. The setting whose bytes are nearest to our model's is taken.
2. It runs on the calibration windows of our own run, in the environment that `bench quality` uses (environments.py:
   made on first use, gigabytes), and is found again by digest when it is asked for twice (jobs.py).
3. Its weights are decoded and judged in the reference, like those of every peer (judge.py).
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save

from ..anatomy import Anatomy
from ..console import Advance
from ..errors import CircuitpressError
from ..evaluate.baselines import Case
from ..evaluate.fidelity import Fidelity
from ..files import write_bytes_atomic
from .environments import ENVIRONMENTS, ensure, peers_folder
from .jobs import Setting, run_peers
from .judge import check, judge
from .padding import neurons_to_pad, padded_shape

METHOD = "gptqmodel"
WIDTHS, GROUPS = (2, 3, 4, 8), (128, 64, 32)
"""Bits and group sizes that GPTQModel takes."""
TIMEOUT = 7200.0
_SMALLER = (64, 32, 16)
"""What the adapter falls back to where a group size does not divide the columns (peers/protocol.py)."""


def gptq(case: Case, advance: Advance) -> Mapping[str, Any]:
    """The document of the reference as GPTQ makes it, with its `setting` and `versions`.

    Raises CircuitpressError if the environment cannot be made or GPTQModel fails.
    """
    anatomy = case.reference.anatomy
    if not len(case.calibration):
        raise CircuitpressError("no text is left to calibrate GPTQ on", hint="measure on fewer --windows, or a --text")
    setting = nearest(anatomy, case.linear_bytes)
    environment = ENVIRONMENTS[setting.environment]
    python = ensure(environment, peers_folder(), advance=advance)
    work = peers_folder() / "baselines"
    content = save({"ids": case.calibration.contiguous()})
    ids = work / f"calibration-{hashlib.sha256(content).hexdigest()[:12]}.safetensors"
    write_bytes_atomic(ids, content)
    (outcome,) = run_peers(
        [setting], anatomy, ids, environment=environment, python=python, work=work, threads=torch.get_num_threads(),
        timeout=TIMEOUT, advance=lambda _, note: advance(0, note),
    )  # fmt: skip
    if outcome.weights is None:
        raise CircuitpressError(
            f"GPTQModel at {setting.budget} failed: {outcome.error}", hint=f"its log is in a folder of {work / 'jobs'}"
        )
    check(anatomy, outcome.weights)
    found = Fidelity(
        divergence=judge(case.reference, case.windows, {METHOD: outcome.weights})[METHOD],
        bytes=outcome.linear_bytes + anatomy.other_bytes,
        reference_bytes=anatomy.file_bytes,
        linear_bytes=outcome.linear_bytes,
        bits_per_weight=8 * outcome.linear_bytes / anatomy.linear_numel,
        seconds=outcome.seconds,
    )
    versions = dict(outcome.versions)
    about = f"GPTQModel {versions.get(METHOD, '')}, {setting.budget}"
    return found.to_json() | {"setting": about, "versions": versions}


def nearest(anatomy: Anatomy, linear_bytes: int) -> Setting:
    """The setting of GPTQModel whose bytes are nearest to `linear_bytes`; of two as near, the larger."""
    offered = [
        (abs(stored(anatomy, b, g) - linear_bytes), -stored(anatomy, b, g), b, g) for b in WIDTHS for g in GROUPS
    ]
    *_, bits, group = min(offered)
    return Setting(METHOD, f"g{group} asym", METHOD, "gptqmodel", bits, group, {"sym": False}, padded=True)


def stored(anatomy: Anatomy, bits: int, group: int) -> int:
    """Bytes that GPTQModel keeps for the linear weights at `bits` in groups of `group`."""
    extra, total = neurons_to_pad(anatomy, 32), 0
    for matrix in (matrix for block in anatomy.blocks for matrix in block.matrices):
        rows, cols = padded_shape(matrix, extra)
        size = next((s for s in (group, *(s for s in _SMALLER if s < group)) if cols % s == 0), 0)
        total += (rows * cols * bits + rows * (cols // size) * (16 + bits)) // 8 if size else 2 * rows * cols
    return total
