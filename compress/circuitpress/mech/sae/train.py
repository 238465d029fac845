"""Trains an SAE on the activations of a site: seeded, resumable, on a CPU in minutes for a small model.

1. Rows are scaled to a mean norm of sqrt(d). Decoder rows start as random unit vectors, the encoder as their
   transpose, b_dec as the mean.
2. Each step: a batch, the loss of the architecture (loss.py), Adam with a linear warm-up and a linear decay over the
   last fifth. The gradient of a decoder row loses its component along the row, and rows are brought back to norm 1: a
   sparse code could else be had by long rows and small activations.
3. A latent that fired on none of the last `dead_after` rows is dead: AuxK revives it.
4. A single token has no batch whose k-th largest it could be compared with: the JumpReLU that BatchTopK is saved as
   gets the mean of that smallest activation over a few batches at the end (a running mean lags behind weights that
   still move: L0 11.9 where 16 was asked for). The same figure, at the start, is where JumpReLU's thresholds begin:
   they move slowly, and from 0.1 they were still at L0 300 when a short run ended.
5. Scale is folded into the biases: with relu, a(s x) = s a(x), so only b_enc, b_dec and thresholds are divided by s.

The state (weights, Adam's moments, counters) is one safetensors file, replaced atomically every half minute. Rows come
in an order that depends on seed and step alone, so an interrupted run ends with the same bits as one that was not.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ...console import Advance, ignore
from ...errors import CircuitpressError, RecipeError
from ...files import write_bytes_atomic
from .loss import Recipe, Step, Weights, evaluate
from .rows import Rows, shuffled
from .value import Sae

_EVERY = 30.0
_LOOKS = 16
"""Batches over which the threshold of BatchTopK is averaged."""


@dataclass(frozen=True)
class Training:
    """How to train: `latents` features of which about `k` are used for a token, `steps` batches of `batch` rows.

    `lr` None is 2e-4 / sqrt(latents / 2^14) (the scaling of arXiv 2406.04093), at least 3e-3 in runs of less than 10
    thousand steps: on a 5 M model, 600 steps left an FVU of 0.146 with 3e-3 and of 0.185 with 1e-3.
    `warmup` and `dead_after` (rows) None are a twentieth of the run, at most 1000 steps and 10 million rows.
    `sparsity` and `bandwidth` are JumpReLU's.
    """

    latents: int
    k: int
    architecture: Recipe = "topk"
    steps: int = 1000
    batch: int = 1024
    lr: float | None = None
    warmup: int | None = None
    dead_after: int | None = None
    sparsity: float = 1.0
    bandwidth: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        """RecipeError names every number that cannot be."""
        problems = [
            f"{name} is {getattr(self, name)}: it must be positive"
            for name in ("latents", "k", "steps", "batch", "bandwidth")
            if getattr(self, name) <= 0
        ]
        if self.k > self.latents:
            problems.append(f"k is {self.k}: there are only {self.latents} latents")
        if problems:
            raise RecipeError(problems, hint="circuitpress sae train --help")

    @property
    def peak(self) -> float:
        """The learning rate after warm-up."""
        return self.lr or max(3e-3 if self.steps < 10_000 else 0.0, 2e-4 / math.sqrt(self.latents / 2**14))

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warmup = self.warmup if self.warmup is not None else min(1000, self.steps // 20)
        decay = (self.steps - step) / max(1.0, self.steps / 5)
        return self.peak * min(1.0, (step + 1) / (warmup + 1), decay)

    @property
    def patience(self) -> int:
        """Rows without firing after which a latent is dead."""
        return self.dead_after or min(10_000_000, max(1, self.steps // 20) * self.batch)


@dataclass
class _State:
    weights: Weights
    moments: dict[str, Tensor]
    silent: Tensor
    step: int


def train(
    rows: Rows, settings: Training, *, state: Path | None = None, device: torch.device | str = "cpu",
    advance: Advance = ignore,
) -> Sae:  # fmt: skip
    """An SAE of `rows`. `state` is where the run is kept so that the same call again resumes; it is removed at the end.

    `advance` gets twentieths of the run. Raises RecipeError where `state` belongs to other settings or other rows.
    """
    wanted = {"settings": asdict(settings), "rows": list(rows.counts), "site": str(rows.site), "skip": rows.skip}
    wanted["mean"] = float(rows.mean.double().sum())
    now = _load(state, wanted) if state is not None and state.exists() else _fresh(rows, settings)
    _move(now, device)
    parameters = {name: value.requires_grad_(True) for name, value in now.weights.named().items()}
    saved = time.monotonic()
    steps = _run(now, parameters, shuffled(rows, settings.batch, seed=settings.seed, start=now.step), rows, settings)
    for done in steps:
        note = f"step {now.step}, FVU {done.fvu:.4f}, L0 {done.l0:.1f}"
        advance(20 / settings.steps, note)
        if state is not None and time.monotonic() - saved > _EVERY:
            _save(state, now, wanted)
            saved = time.monotonic()
    sae = _finished(now, rows, settings)
    if state is not None:
        state.unlink(missing_ok=True)
    return sae


def _run(
    now: _State, parameters: dict[str, Tensor], batches: Iterator[Tensor], rows: Rows, settings: Training
) -> Iterator[Step]:
    """Takes the steps that are left, in place."""
    while now.step < settings.steps:
        z = next(batches).to(parameters["w_dec"].device) * rows.factor
        dead = now.silent > settings.patience
        ramp = min(1.0, (now.step + 1) / max(1, settings.steps // 5))
        done = evaluate(
            settings.architecture, now.weights, z, settings.k, dead, sparsity=ramp * settings.sparsity,
            bandwidth=settings.bandwidth,
        )  # fmt: skip
        if not math.isfinite(done.fvu):
            raise CircuitpressError(
                f"training diverged at step {now.step}", hint=f"pass a smaller --lr than {settings.peak:g}"
            )
        gradients = dict(zip(parameters, torch.autograd.grad(done.loss, list(parameters.values())), strict=True))
        with torch.no_grad():
            rows_of = parameters["w_dec"]
            gradients["w_dec"] -= (gradients["w_dec"] * rows_of).sum(1, keepdim=True) * rows_of
            now.step += 1
            for name, parameter in parameters.items():
                _adam(parameter, gradients[name], now.moments, name, now.step, settings.rate(now.step - 1))
            rows_of /= rows_of.norm(dim=1, keepdim=True)
            now.silent += len(z)
            now.silent[done.fired] = 0
        yield done


def _adam(parameter: Tensor, gradient: Tensor, moments: dict[str, Tensor], name: str, step: int, rate: float) -> None:
    """One step of Adam with betas (0.9, 0.999); written out so that its whole state is a few named tensors."""
    first, second = moments[f"first.{name}"], moments[f"second.{name}"]
    first.lerp_(gradient, 0.1)
    second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
    scale = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
    parameter.addcdiv_(first, scale, value=-rate / (1 - 0.9**step))


def _fresh(rows: Rows, settings: Training) -> _State:
    generator = torch.Generator().manual_seed(settings.seed)
    w_dec = torch.randn(settings.latents, len(rows.mean), generator=generator)
    w_dec /= w_dec.norm(dim=1, keepdim=True)
    weights = Weights(w_dec.T.clone(), torch.zeros(settings.latents), w_dec, rows.mean * rows.factor)
    if settings.architecture == "jumprelu":
        weights.log_threshold = torch.full((settings.latents,), math.log(max(1e-3, _least(weights, rows, settings))))
    named = weights.named().items()
    moments = {f"{order}.{name}": torch.zeros_like(value) for name, value in named for order in ("first", "second")}
    return _State(weights, moments, torch.zeros(settings.latents, dtype=torch.int64), 0)


@torch.no_grad()
def _least(weights: Weights, rows: Rows, settings: Training) -> float:
    """The smallest activation that BatchTopK uses, the mean over a few batches."""
    device = weights.w_dec.device
    none = torch.zeros(settings.latents, dtype=torch.bool, device=device)
    batches = shuffled(rows, settings.batch, seed=settings.seed)
    found = [
        evaluate("batchtopk", weights, next(batches).to(device) * rows.factor, settings.k, none).least
        for _ in range(_LOOKS)
    ]
    return sum(found) / len(found)


def _move(now: _State, device: torch.device | str) -> None:
    now.weights = Weights(**{name: value.to(device) for name, value in now.weights.named().items()})
    now.moments = {name: value.to(device) for name, value in now.moments.items()}
    now.silent = now.silent.to(device)


def _finished(now: _State, rows: Rows, settings: Training) -> Sae:
    weights = {name: value.detach().cpu() for name, value in now.weights.named().items()}
    threshold = None
    if settings.architecture == "jumprelu":
        threshold = weights["log_threshold"].exp() / rows.factor
    elif settings.architecture == "batchtopk":
        threshold = torch.full((settings.latents,), _least(now.weights, rows, settings) / rows.factor)
    return Sae(
        weights["w_enc"], weights["b_enc"] / rows.factor, weights["w_dec"], weights["b_dec"] / rows.factor,
        "topk" if threshold is None else "jumprelu", threshold, settings.k if threshold is None else None,
        site=rows.site, skip=rows.skip,
    )  # fmt: skip


def _save(path: Path, now: _State, wanted: dict[str, Any]) -> None:
    tensors = now.weights.named() | now.moments | {"silent": now.silent}
    note = json.dumps(wanted | {"step": now.step})
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_bytes_atomic(path, save(plain, metadata={"circuitpress": note}))


def _load(path: Path, wanted: dict[str, Any]) -> _State:
    try:
        with safe_open(path, framework="pt") as file:
            note = json.loads((file.metadata() or {})["circuitpress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CircuitpressError(f"{path} is damaged: {error}", hint=f"remove it to start again: rm {path}") from error
    old = {**note["settings"], **{key: note[key] for key in wanted if key != "settings"}}
    new = {**wanted["settings"], **{key: wanted[key] for key in wanted if key != "settings"}}
    changed = [f"{key} was {old.get(key)}, is now {new[key]}" for key in new if old.get(key) != new[key]]
    if changed:
        raise RecipeError(
            [f"{path.parent} holds an unfinished run with other settings: {text[:200]}" for text in changed],
            hint=f"pass another --out, or remove {path} to start again",
        )
    moments = {name: tensors.pop(name) for name in list(tensors) if name.startswith(("first.", "second."))}
    silent = tensors.pop("silent")
    return _State(Weights(**tensors), moments, silent, note["step"])
