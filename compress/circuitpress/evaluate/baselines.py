"""What the reference becomes under quantizers that everybody has at hand, judged like our own models.

bitsandbytes rounds to nearest, without looking at text: `nf4` takes 4.5 bits a weight, `int8` 8 and a scale a row. The
weights are what it stores, decoded by its tables (bnb.py), so the figure is that of its codes and not of its kernels.
Calibrated quantizers run in environments of their own (bench/gptq.py) and are handed in.
"""

import contextlib
import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..console import Advance, Console
from ..errors import CircuitpressError
from ..stream import Stream, open_stream
from .fidelity import Fidelity, fidelity


@dataclass(frozen=True)
class Case:
    """What a baseline is made for: `reference`, test windows int64 [n, length] and others to calibrate on.

    `linear_bytes` are those of the model that it stands beside; a baseline that has settings takes the nearest.
    """

    reference: Stream
    windows: Tensor
    calibration: Tensor
    linear_bytes: int


Baseline = Callable[[Case, Advance], Mapping[str, Any]]
"""Gives the document of a `Fidelity`, and `setting` where there is something to say. Raises CircuitpressError."""

BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}
"""Name -> transformers' BitsAndBytesConfig."""


def choose(names: Sequence[str], others: Mapping[str, Baseline]) -> dict[str, Baseline]:
    """The baselines called `names`, of bitsandbytes' and `others`; CircuitpressError for names that neither has."""
    known: dict[str, Baseline] = {name: partial(_document, name) for name in BITSANDBYTES} | dict(others)
    if strangers := [name for name in names if name not in known]:
        raise CircuitpressError(
            f"no baseline called {', '.join(strangers)}: there are {', '.join(known)}",
            hint="for others, and for more settings: circuitpress bench quality MODEL",
        )
    return {name: known[name] for name in names}


def measure_baselines(chosen: Mapping[str, Baseline], case: Case, console: Console) -> dict[str, dict[str, Any]]:
    """The document of every baseline; of one that cannot be made `error` and `hint`, and the others all the same."""
    found: dict[str, dict[str, Any]] = {}
    with console.progress("baseline", len(chosen)) as advance:
        for name, make in chosen.items():
            try:
                found[name] = dict(make(case, advance))
            except CircuitpressError as error:
                found[name] = {"error": error.message, "hint": error.hint}
            advance(1, name)
    return found


def bitsandbytes(name: str, reference: Stream, windows: Tensor) -> Fidelity:
    """`reference` as `name` of BITSANDBYTES, against `reference` on windows int64 [n, length].

    Raises CircuitpressError without the package bitsandbytes.
    """
    with tempfile.TemporaryDirectory() as folder:
        _quantize(name, reference.anatomy.folder, Path(folder))
        return fidelity(open_stream(Path(folder), device=str(reference.device)), reference, windows)


def _document(name: str, case: Case, advance: Advance) -> Mapping[str, Any]:
    del advance  # one step
    return bitsandbytes(name, case.reference, case.windows).to_json()


def _quantize(name: str, source: Path, out: Path) -> None:
    import transformers

    config = transformers.BitsAndBytesConfig(**BITSANDBYTES[name])
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    # Computed on a CPU everywhere: 8-bit layers move to a GPU only as a whole model, which may not fit.
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            model = load(source, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32)
            model.save_pretrained(out)
    except ImportError as error:
        raise CircuitpressError(
            f"the baseline {name} needs bitsandbytes: {error}", hint="pip install 'circuitpress[bnb]'"
        ) from error
