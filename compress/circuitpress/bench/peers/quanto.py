# pyright: reportMissingImports=false
"""optimum-quanto: qint2 and qint4, groups of the package's own choice (https://github.com/huggingface/optimum-quanto).

It takes one scale a row for up to 128 inputs, else the first of 128, 96, 64 and 32 that divides them; scale and shift
are floating point and counted as float16.
"""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .protocol import Job, Kept, affine_bytes


def quantize(job: Job) -> Mapping[str, Kept]:
    """`options`: optimizer (`max`, the package's default, or `hqq`)."""
    from optimum import quanto

    _warm_up(quanto, job.bits)
    model = job.load()
    optimizer = quanto.HqqOptimizer() if job.options.get("optimizer") == "hqq" else quanto.MaxOptimizer()
    # Under inference_mode it fails: "Cannot set version_counter for inference tensor".
    with job.timed(), torch.no_grad():
        quanto.quantize(
            model, weights=getattr(quanto, f"qint{job.bits}"), include=list(job.matrices), optimizer=optimizer
        )
        quanto.freeze(model)
    found = {}
    for name, linear in job.linears(model).items():
        rows, cols = job.matrices[name]
        group = getattr(linear.weight, "_group_size", None) or cols
        nbytes = affine_bytes(rows, cols, job.bits, group, zero_bits=16)
        found[name] = Kept(linear.weight.dequantize().detach().float(), nbytes)
    return found


def _warm_up(quanto: ModuleType, bits: int) -> None:
    """Makes the package compile its extension (minutes, once an environment) before the clock runs.

    A compilation that was killed leaves a lock that the next one waits for without end; nobody else works here.
    """
    for lock in Path(quanto.__path__[0]).glob("library/extensions/*/build/lock"):
        lock.unlink(missing_ok=True)
    tiny: Any = torch.nn.Sequential(torch.nn.Linear(128, 8))
    with torch.no_grad():
        quanto.quantize(tiny, weights=getattr(quanto, f"qint{bits}"))
        quanto.freeze(tiny)
        tiny[0].weight.dequantize()
