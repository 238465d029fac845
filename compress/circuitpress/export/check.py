"""Is the exported folder the model that was planned? A stranger computes its logits, and they are compared.

1. The packed model is loaded here in float32. Where an export rounds to 16 bits (the numbers that codes stand for, if
   it is dense; all others, if it was asked to), so does this.
2. A fresh Python loads the folder with its own consumer, circuitpress barred (stranger.py), and computes the logits of
   the same tokens.
3. The largest difference must be at most `TOLERANCE` times the largest logit, and no tensor may be missing or left
   over. Both sides compute in float32 with the same architecture: equal weights gave equal logits to the last bit on
   stories260K and the demo model, for every target. The tolerance leaves room for another order of summation.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import CircuitpressError

TOLERANCE = 1e-4
WINDOWS, LENGTH = 4, 48
_SEED = 5


@dataclass(frozen=True)
class Checked:
    """How the logits of an exported folder compare with those of the packed model, on `tokens` tokens.

    `max_logit_error` is the largest difference, `largest_logit` what it is relative to. `kl` is KL(packed || exported),
    nats per token. `as_is` are error and KL of LLM.int8's own arithmetic, which rounds activations too.
    """

    max_logit_error: float
    largest_logit: float
    kl: float
    tokens: int
    tolerance: float
    facts: dict[str, Any] = field(default_factory=dict)
    as_is: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """The entry `check` of export.json."""
        return asdict(self)


def token_windows(vocab: int, context: int) -> Tensor:
    """Random tokens int64 [4, at most 48]: a check of weights needs no text, and every model has them."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(vocab, (WINDOWS, min(LENGTH, context or LENGTH)), generator=generator)


@torch.no_grad()
def packed_logits(
    folder: Path, ids: Tensor, *, rounded: torch.dtype | None = None, cast: torch.dtype | None = None
) -> Tensor:
    """Logits float32 [n, length, vocab] of a model folder.

    Packed weights are first rounded to `rounded` and all others to `cast`, where given.
    """
    import transformers

    from ..runtime.embedding import PackedEmbedding
    from ..runtime.linear import PackedLinear

    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    with _without_bars():
        model = load(folder, dtype=torch.float32).eval()
    for module in model.modules() if rounded else ():
        if isinstance(module, PackedLinear | PackedEmbedding) and module.form == "dense":
            module.get_buffer("weight").copy_(module.get_buffer("weight").to(rounded).float())
    for parameter in model.parameters() if cast else ():
        parameter.copy_(parameter.to(cast).float())
    return torch.cat([model(row[None]).logits.float() for row in ids])


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """transformers draws no bar of its own beside ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check(folder: Path, ids: Tensor, expected: Tensor) -> Checked:
    """Compares the logits of `folder` in a fresh process with `expected`; CircuitpressError if they differ."""
    found, as_is, facts = _ask(folder, ids)
    if faults := {key: names for key, names in facts.pop("faults").items() if names}:
        raise CircuitpressError(f"{folder.name}: transformers reports {faults}", hint=_HINT)
    largest = float(expected.abs().max())
    result = Checked(
        max_logit_error=float((found - expected).abs().max()),
        largest_logit=largest,
        kl=_kl(expected, found),
        tokens=ids.numel(),
        tolerance=TOLERANCE * max(1.0, largest),
        facts=facts,
        as_is=None
        if as_is is None
        else {"max_logit_error": float((as_is - expected).abs().max()), "kl": _kl(expected, as_is)},
    )
    if not result.max_logit_error <= result.tolerance:
        raise CircuitpressError(
            f"the exported model computes something else: logits differ by {result.max_logit_error:.3g}, at most "
            f"{result.tolerance:.3g} is rounding; nothing was kept",
            hint=_HINT,
        )
    return result


_HINT = "this is a fault of circuitpress or of the installed version of the runtime: report it with `pip list`"


def _ask(folder: Path, ids: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="circuitpress-") as name:
        request, out = Path(name) / "request.safetensors", Path(name) / "answer.safetensors"
        save_file({"ids": ids}, request)
        script = Path(__file__).with_name("stranger.py")
        command = [sys.executable, "-I", str(script), str(folder.resolve()), str(request), str(out)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        if done.returncode or not out.exists():
            lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["no message"]
            raise CircuitpressError(f"a fresh process cannot load the exported model: {lines[-1]}", hint=_HINT)
        tensors = load_file(out)
        with safe_open(out, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
    assert not facts.pop("ours"), "the stranger imported circuitpress"
    return tensors["logits"], tensors.get("logits_as_is"), facts


def _kl(reference: Tensor, found: Tensor) -> float:
    p, q = reference.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
