"""A side path of low rank that makes a rounded matrix right on a few directions of its input, against more bits.

    W^ + (W - W^) V V^T,  V [cols, r] orthonormal:  V takes r cols numbers, (W - W^) V takes r rows, both in float16

is W itself on the span of V (in exact arithmetic). It is put on every matrix that reads the residual stream above an
SAE's site, and its bytes are taken from the plan: one budget, the same plan for all kinds of V of one rank.

| kind | V |
|---|---|
| bits | none: the planner has all bytes |
| features | what the matrix reads of the features that cost most to close: decoder rows times the norm's gain |
| eigenvectors | of the largest eigenvalues of the Hessian that the matrix is rounded with |
| random | Gaussian, by seed |
| best | W^ + U U^T (W - W^) instead, U of the largest eigenvalues of (W - W^) H (W - W^)^T: no path of this rank does |
| | better by that Hessian (the truncated SVD of (W - W^) H^1/2; EoRA, arXiv 2410.21271) |

A row is the KL on test text, and its difference to `bits` window by window.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from torch import Tensor, nn

from circuitpress.anatomy import Block, Matrix
from circuitpress.errors import InfeasibleBudget
from circuitpress.hooks import replace, weight_of
from circuitpress.plan import make_plan
from circuitpress.rounding import block_hessians, context, decoded_in_place, round_block, segments_by_module
from circuitpress.score.variants import Edit, measure_windows
from circuitpress.stream import Stream
from circuitpress.units import Prices

NORMS = {"q": "input_layernorm", "k": "input_layernorm", "v": "input_layernorm"} | {
    role: "post_attention_layernorm" for role in ("gate", "up")
}
"""The norm through which each role reads the residual stream, in blocks of Llama's kind."""
NUMBER = 2
"""Bytes of a float16."""


class Variant(NamedTuple):
    """One row: the budget in bits per weight, the kind of side path, its rank (0 for none) and seed."""

    budget: float
    kind: str
    rank: int
    seed: int


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
    the folder of what `calibration` int64 [n, length] was priced to.
    """
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
            for variant in variants(budget, rank, seeds):
                weights = dict(rounded)
                if rank and index > site:
                    weights |= _corrected(module, place, rounded, hessians, directions, variant)
                change = partial(replace, module, weights, transposed=place.matrices[0].transposed)
                found[_name(variant)] = change
        return found

    kl = measure_windows(stream, test, edits, context=context(calibration, shards))
    rows = []
    for budget, rank in layouts:
        plain = kl[_name(Variant(budget, "bits", 0, 0))]
        for variant in variants(budget, rank, seeds):
            mine = kl[_name(variant)]
            difference = mine - plain
            rows.append(
                {
                    "budget": f"{budget:g}bpw",
                    "method": f"side path:{variant.kind}" if rank else "bits",
                    "rank": rank,
                    "seed": variant.seed,
                    "bits_per_weight": sizes[budget, rank],
                    "side_bits": 8 * rank * cost / numel,
                    "kl": float(mine.mean()),
                    "against_bits": float(difference.mean()),
                    "against_bits_stderr": float(difference.std(ddof=1) / np.sqrt(len(difference))),
                }
            )
    return rows


def variants(budget: float, rank: int, seeds: int) -> list[Variant]:
    """What is measured at one budget and rank."""
    if not rank:
        return [Variant(budget, "bits", 0, 0)]
    fixed = [Variant(budget, kind, rank, 0) for kind in ("features", "eigenvectors", "best")]
    return fixed + [Variant(budget, "random", rank, seed) for seed in range(seeds)]


def _name(variant: Variant) -> str:
    return " ".join(map(str, variant))


def _corrected(
    module: nn.Module, place: Block, rounded: Mapping[str, Tensor], hessians: Mapping[str, Tensor], directions: Tensor,
    variant: Variant,
) -> dict[str, Tensor]:  # fmt: skip
    """The matrices of a block with their side paths, by local name."""
    found = {}
    for matrix in (m for m in place.matrices if m.role in NORMS):
        name, hessian = place.local(matrix), hessians[matrix.module]
        error = weight_of(module, place, matrix).float() - rounded[name]
        if variant.kind == "best":
            side = best_side(error, hessian, variant.rank)
        else:
            side = read_side(error, _basis(module, matrix, hessian, directions, variant))
        found[name] = rounded[name] + side.to(error.dtype)
    return found


def _basis(module: nn.Module, matrix: Matrix, hessian: Tensor, directions: Tensor, variant: Variant) -> Tensor:
    if variant.kind == "eigenvectors":
        return torch.linalg.eigh(hessian.double()).eigenvectors[:, -variant.rank :]
    if variant.kind == "random":
        generator = torch.Generator().manual_seed(variant.seed)
        return orthonormal(torch.randn(variant.rank, matrix.cols, generator=generator), variant.rank)
    gain = module.get_submodule(NORMS[matrix.role]).weight
    assert isinstance(gain, Tensor)
    return orthonormal(directions.double() * gain.detach().double(), variant.rank)
