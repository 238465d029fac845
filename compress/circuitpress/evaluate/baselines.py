"""What the reference becomes under quantizers that everybody has at hand, judged like our own models.

bitsandbytes rounds to nearest, without looking at text: `nf4` takes 4.5 bits a weight, `int8` 8 and a scale a row. The
weights are what it stores, decoded by its tables (bnb.py), so the figure is that of its codes and not of its kernels.
Calibrated quantizers need environments of their own: `circuitpress bench quality` sets those up.
"""

import contextlib
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CircuitpressError
from ..stream import Stream, open_stream
from .fidelity import Fidelity, fidelity

BASELINES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}
"""Name -> transformers' BitsAndBytesConfig."""


def baseline(name: str, reference: Stream, windows: Tensor) -> Fidelity:
    """`reference` quantized by the baseline `name` of BASELINES, against `reference` on windows int64 [n, length].

    Raises CircuitpressError for other names and without bitsandbytes.
    """
    check_baselines([name])
    with tempfile.TemporaryDirectory() as folder:
        _quantize(name, reference.anatomy.folder, Path(folder))
        return fidelity(open_stream(Path(folder), device=str(reference.device)), reference, windows)


def check_baselines(names: Sequence[str]) -> None:
    """Raises CircuitpressError for names that BASELINES has not."""
    if strangers := [name for name in names if name not in BASELINES]:
        raise CircuitpressError(
            f"no baseline called {', '.join(strangers)}: there are {', '.join(BASELINES)}",
            hint="for calibrated quantizers: circuitpress bench quality MODEL --peers optimum-gptq",
        )


def _quantize(name: str, source: Path, out: Path) -> None:
    import transformers

    config = transformers.BitsAndBytesConfig(**BASELINES[name])
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
