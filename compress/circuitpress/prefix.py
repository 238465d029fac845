"""Rounding for the inputs that the compressed model itself will see: those behind its own rounded prefix.

A matrix W that maps x in the original model meets other inputs y once everything before it is rounded. What should
stay is W x, so its codes Q are to minimise

    E[s |W x - Q y|^2] = tr((Q - W') H (Q - W')^T) + const,  W' = W + W D H^-1,  D = E[s (x - y) y^T],  H = E[s y y^T]

which is GPTQ of W' on the Hessian of y (GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695; s are the token weights of
price.py). Two walks go up side by side, the original's and that of the model as compressed so far; within a block the
matrices are rounded in the order in which they feed each other, and y is measured anew before each step.

Of the way from W to W' half is taken (SHARE). All of it fits the noise of the calibration text too.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .anatomy import Block, Matrix
from .hooks import capture, input_of, replace, weight_of
from .lean import leant
from .price import load_hessians, load_saliency, permute_inputs, permute_neurons, shard_path
from .quantize import Quantized, quantize_matrix
from .quantize.polish import DAMPING
from .rounding import NOTHING, Entry, decoded_in_place, with_floating
from .score.fisher import add_second_moment
from .store import Store
from .stream import Stream

STEPS = (("q", "k", "v", "qkv"), ("o",), ("gate", "up"), ("down",))
"""Roles in the order in which they feed each other."""
SHARE = 0.5
"""Of the way to W'. KL at 2, 3, 4 bits in groups of 64, without refinement: stories260K 2.31, .431, .0855 with none,
1.49, .314, .0646 with half, 1.67, .343, .0628 with all of it; babyllama-105 at 2 bits .470, .322, .332."""

Beside = Sequence[tuple[Path, float]]
"""Folders of price shards whose Hessians, times a weight, join those that weights are rounded with."""


class Prefix:
    """The hidden states of the model as compressed so far, block by block. `store` holds them; the caller clears it."""

    def __init__(
        self, stream: Stream, batches: Sequence[Tensor], store: Store, saliency: Path, beside: Beside = ()
    ) -> None:  # fmt: skip
        self._stream, self._store, self._saliency, self._beside = stream, store, saliency, beside
        self._count = len(batches)
        for b, ids in enumerate(batches):
            store.put((b,), stream.embed(ids))

    @torch.no_grad()
    def round(
        self, module: nn.Module, place: Block, inputs: Callable[[int], Tensor],
        plan: Mapping[str, tuple[str, list[Entry]]], order: Tensor | None, *, polish: bool = True,
        pulled: Mapping[str, Tensor] = NOTHING,
    ) -> dict[str, Quantized]:  # fmt: skip
        """Quantizes every matrix of a resident block as `plan` says; arguments as of `rounding.round_block`.

        `inputs(b)` is the block's input in the original model, [batch, length, hidden].
        """
        folders = [(folder, weight) for folder, weight in self._beside if shard_path(folder, place.index).exists()]
        beside = [(load_hessians(folder, place, self._stream.device), weight) for folder, weight in folders]
        steps = [[matrix for matrix in place.matrices if matrix.role in roles] for roles in STEPS]
        self._read_original(module, place, inputs, steps)
        result: dict[str, Quantized] = {}
        for step, matrices in enumerate(steps):
            hessians, drifts = self._moments(module, place, step, matrices, decoded_in_place(result, place, order))
            for matrix in matrices:
                weight = weight_of(module, place, matrix).float()
                hessian, drift = hessians.pop(matrix.module), drifts.pop(matrix.module)
                for other, share in beside:
                    hessian += share * other[matrix.module]
                moved = leant(weight + SHARE * weight @ _solve(hessian, drift), hessian, pulled.get(matrix.module))
                if order is not None:
                    weight, moved = (permute_neurons(matrix.role, w, order) for w in (weight, moved))
                    hessian = permute_inputs(matrix.role, hessian, order)
                axis, segments = plan[matrix.module]
                moved = with_floating(moved, weight, axis, segments)
                result[matrix.module] = quantize_matrix(moved, hessian, axis, segments, polish=polish)  # pyright: ignore[reportArgumentType]
        return result

    @torch.no_grad()
    def follow(self, module: nn.Module, place: Block, weights: Mapping[str, Tensor]) -> None:
        """Carries the states through a resident block that has `weights` [rows, cols] by local name."""
        with replace(module, weights, transposed=place.matrices[0].transposed):
            for b in range(self._count):
                hidden = self._store.get((b,), self._stream.device)
                self._store.put((b,), self._stream.run(place.index, module, hidden))

    def _read_original(
        self, module: nn.Module, place: Block, inputs: Callable[[int], Tensor], steps: Sequence[Sequence[Matrix]]
    ) -> None:
        """Stores what the matrices of each step read in the original, x [tokens, cols], under (b, step)."""
        names = [place.local(matrices[0]) for matrices in steps]
        for b in range(self._count):
            with capture(module, names) as seen:
                self._stream.run(place.index, module, inputs(b))
            for step, name in enumerate(names):
                self._store.put((b, step), _flat(seen[name].input))

    def _moments(
        self, module: nn.Module, place: Block, step: int, matrices: Sequence[Matrix], done: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """H = E[s y y^T] and D = E[s (x - y) y^T] [cols, cols] of the matrices of a step, by module name.

        `done` are the block's weights of earlier steps, by local name.
        """
        stream, at = self._stream, 0
        weights = {m.module: load_saliency(self._saliency, place.index, m.module) for m in matrices}
        hessians = {m.module: torch.zeros(m.cols, m.cols, device=stream.device) for m in matrices}
        drifts = {name: torch.zeros_like(hessian) for name, hessian in hessians.items()}
        local = place.local(matrices[0])
        for b in range(self._count):
            hidden = self._store.get((b,), stream.device)
            with replace(module, done, transposed=place.matrices[0].transposed):
                y = input_of(module, local, lambda h=hidden: stream.run(place.index, module, h)).flatten(0, -2).float()
            difference = self._store.get((b, step), stream.device).float() - y
            self._store.drop((b, step))
            for name, mine in weights.items():
                s = mine[at : at + hidden.shape[0]].reshape(-1).to(stream.device) / mine.numel()
                add_second_moment(hessians[name], y, s)
                drifts[name].addmm_((difference * s[:, None]).T, y)
            at += hidden.shape[0]
        return hessians, drifts


def _flat(x: Tensor | None) -> Tensor:
    assert x is not None  # the self-test of the hooks has proved that the site is called
    return x.flatten(0, -2)


def _solve(hessian: Tensor, drift: Tensor) -> Tensor:
    """D H^-1 [cols, cols] with the damping of GPTQ; zero where H cannot be factored even so."""
    damped = hessian.clone()
    damped.diagonal().add_(DAMPING * float(hessian.diagonal().mean()))
    lower, info = torch.linalg.cholesky_ex(damped)
    if int(info) or not bool(drift.isfinite().all()):
        return torch.zeros_like(drift)
    return torch.cholesky_solve(drift.T, lower).T
