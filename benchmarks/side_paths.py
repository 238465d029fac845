"""A side path of low rank that makes a rounded matrix right on a few directions of its input, against more bits.

    W^ + (W - W^) V V^T,  V [cols, r] orthonormal:  V takes r cols numbers, (W - W^) V takes r rows, both in float16

is W itself on the span of V (in exact arithmetic). It is put on every matrix that reads the residual stream above an
SAE's site, and its bytes are taken from the plan: one budget, and for all kinds of V of one rank the same plan.

| kind | V |
|---|---|
| bits | none, and the planner has all bytes |
| no path | none, on the plan that a path leaves: what a path has to make good |
| features | what the matrix reads of the features that cost most to close: decoder rows times the norm's gain |
| eigenvectors | of the largest eigenvalues of the Hessian that the matrix is rounded with |
| random | Gaussian, by seed |
| best | W^ + U U^T (W - W^), U of the largest eigenvalues of (W - W^) H (W - W^)^T: no path of this rank leaves a |
| | smaller error by that Hessian (truncated SVD of (W - W^) H^1/2, as EoRA, arXiv 2410.21271) |

With V every matrix is rounded twice: as the plan says (`best` starts there), and `, rounded for it` with (1 - V V^T) H
(1 - V V^T), since an error in the span of V no longer costs anything. A row is the KL on test text, and its difference
to `bits` window by window.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace as changed
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from circuitpress.anatomy import Block, Matrix
from circuitpress.errors import InfeasibleBudget
from circuitpress.hooks import replace, weight_of
from circuitpress.plan import make_plan
from circuitpress.rounding import Entry, block_hessians, context, decoded_in_place, round_block, segments_by_module
from circuitpress.score.variants import Edit, measure_windows
from circuitpress.stream import Stream
from circuitpress.units import Prices

NORMS = {"q": "input_layernorm", "k": "input_layernorm", "v": "input_layernorm"} | {
    role: "post_attention_layernorm" for role in ("gate", "up")
}
"""The norm through which each role reads the residual stream, in blocks of Llama's kind."""
NUMBER = 2
"""Bytes of a float16."""
FOR_IT = ", rounded for it"
Weights = Mapping[str, Tensor]
Layout = Mapping[str, tuple[str, list[Entry]]]


def orthonormal(directions: Tensor, rank: int) -> Tensor:
    """V float64 [cols, at most rank]: a basis of the first of `directions` [n, cols] that do not depend on others."""
    kept: list[Tensor] = []
    for row in directions.double():
        rest = row / row.norm()
        for _ in range(2):  # once more takes away what rounding left
            for other in kept:
                rest = rest - (rest @ other) * other
        if len(kept) < rank and rest.norm() > 1e-6:
            kept.append(rest / rest.norm())
    return torch.stack(kept, 1)


def read_side(error: Tensor, basis: Tensor, dtype: torch.dtype = torch.float16) -> Tensor:
    """E V V^T [rows, cols] of error [rows, cols] and basis [cols, r] with both factors stored in `dtype`."""
    error, basis = error.double(), basis.double()
    return (error @ basis).to(dtype).double() @ basis.T.to(dtype).double()


def best_side(error: Tensor, hessian: Tensor, rank: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """U U^T E [rows, cols]: of rank `rank`, with the least tr((E - it) H (E - it)^T); factors stored in `dtype`."""
    error = error.double()
    basis = torch.linalg.eigh(error @ hessian.double() @ error.T).eigenvectors[:, -rank:]
    return basis.to(dtype).double() @ (basis.T @ error).to(dtype).double()


def readers(stream: Stream, site: int) -> list[tuple[Block, Matrix]]:
    """The matrices that read the residual stream above the output of block `site`."""
    blocks = [block for block in stream.anatomy.blocks if block.index > site]
    return [(block, matrix) for block in blocks for matrix in block.matrices if matrix.role in NORMS]


def side_paths(
    stream: Stream, calibration: Tensor, test: Tensor, directions: Tensor, site: int, *, prices: Prices, shards: Path,
    budgets: Sequence[float], ranks: Sequence[int], seeds: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows for all kinds at every budget (bits per weight) and rank that leaves the planner enough.

    `directions` [n, hidden] are the decoder rows of features at the output of block `site`, strongest first; `shards`
    the folder of what `calibration` int64 [n, length] was priced to. UsageError for a model of another kind.
    """
    if lacking := set(NORMS) - {matrix.role for block in stream.anatomy.blocks for matrix in block.matrices}:
        raise click.UsageError(
            f"side paths need blocks of Llama's kind: this model has no {', '.join(sorted(lacking))}"
        )
    numel = stream.anatomy.linear_numel
    cost = sum(NUMBER * (matrix.rows + matrix.cols) for _, matrix in readers(stream, site))
    layouts, sizes = {}, {}
    for budget in budgets:
        for rank in (0, *ranks):
            try:
                left = f"{budget - 8 * rank * cost / numel:.9f}bpw"
                plan = make_plan(prices, budget=left, other_bytes=stream.anatomy.other_bytes)
            except InfeasibleBudget:
                click.echo(f"rank {rank} leaves no plan of {budget:g} bits")
                continue
            layouts[budget, rank] = segments_by_module(plan.decisions)
            sizes[budget, rank] = plan.bits_per_weight + 8 * rank * cost / numel
    batches = len(stream.batches(calibration))

    def edits(index: int, module: nn.Module, inputs: Callable[[int], Tensor]) -> Mapping[str, Edit]:
        place = stream.anatomy.blocks[index]
        hessians = block_hessians(stream, module, place, inputs, batches, shards)
        found: dict[str, Edit] = {}
        for (budget, rank), layout in layouts.items():
            rounded = decoded_in_place(round_block(module, place, layout, hessians, None), place, None)
            for kind, seed in kinds(rank, seeds):
                weights = dict(rounded)
                if index > site and kind not in ("bits", "no path"):
                    weights |= with_path(module, place, layout, rounded, hessians, directions, rank, kind, seed)
                found[_name(budget, rank, kind, seed)] = partial(
                    replace, module, weights, transposed=place.matrices[0].transposed
                )
        return found

    kl = measure_windows(stream, test, edits, context=context(calibration, shards))
    rows = []
    for budget, rank in layouts:
        for kind, seed in kinds(rank, seeds):
            mine = kl[_name(budget, rank, kind, seed)]
            difference = mine - kl[_name(budget, 0, "bits", 0)]
            rows.append(
                {
                    "budget": f"{budget:g}bpw",
                    "method": kind,
                    "rank": rank,
                    "seed": seed,
                    "bits_per_weight": sizes[budget, rank],
                    "side_bits": 8 * rank * cost / numel,
                    "kl": float(mine.mean()),
                    "against_bits": float(difference.mean()),
                    "against_bits_stderr": float(difference.std(ddof=1) / np.sqrt(len(difference))),
                }
            )
    return rows


def kinds(rank: int, seeds: int) -> list[tuple[str, int]]:
    """Kind and seed of everything that is measured at one rank."""
    if not rank:
        return [("bits", 0)]
    bases = [("features", 0), ("eigenvectors", 0), *(("random", seed) for seed in range(seeds))]
    return [("no path", 0), ("best", 0), *bases, *((kind + FOR_IT, seed) for kind, seed in bases)]


def with_path(
    module: nn.Module, place: Block, layout: Layout, rounded: Weights, hessians: Weights, directions: Tensor,
    rank: int, kind: str, seed: int,
) -> dict[str, Tensor]:  # fmt: skip
    """The matrices of a resident block that read the residual stream, with their side paths, by local name."""
    place = changed(place, matrices=tuple(m for m in place.matrices if m.role in NORMS))
    bases = {}
    if kind != "best":
        bases = {
            m.module: _basis(module, m, hessians[m.module], directions, rank, kind.removesuffix(FOR_IT), seed)
            for m in place.matrices
        }
    if kind.endswith(FOR_IT):
        freed = {name: freed_of(hessians[name], basis) for name, basis in bases.items()}
        rounded = decoded_in_place(round_block(module, place, layout, freed, None), place, None)
    found = {}
    for matrix in place.matrices:
        name = place.local(matrix)
        error = weight_of(module, place, matrix).float() - rounded[name]
        if kind == "best":
            side = best_side(error, hessians[matrix.module], rank)
        else:
            side = read_side(error, bases[matrix.module])
        found[name] = rounded[name] + side.to(error.dtype)
    return found


def freed_of(hessian: Tensor, basis: Tensor) -> Tensor:
    """(1 - V V^T) H (1 - V V^T) [cols, cols] in the type of `hessian`."""
    rest = torch.eye(len(hessian), dtype=torch.float64) - basis @ basis.T
    return (rest @ hessian.double() @ rest).to(hessian.dtype)


def _basis(
    module: nn.Module, matrix: Matrix, hessian: Tensor, directions: Tensor, rank: int, kind: str, seed: int
) -> Tensor:
    """V float64 [cols, rank]."""
    if kind == "eigenvectors":
        return torch.linalg.eigh(hessian.double()).eigenvectors[:, -rank:]
    if kind == "random":
        return orthonormal(torch.randn(rank, matrix.cols, generator=torch.Generator().manual_seed(seed)), rank)
    gain = module.get_submodule(NORMS[matrix.role]).weight
    assert isinstance(gain, Tensor)
    return orthonormal(directions.double() * gain.detach().double(), rank)


def _name(*variant: float | str) -> str:
    return " ".join(map(str, variant))
