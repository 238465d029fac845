"""Products with the experts that tokens choose, all of a layer in one launch: their matrices, one behind the other.

    y[t, j] = act(W[choice[t, j]] x)         x: row t, or row t * k + j where each choice has its own

1. Every expert is laid out as a matrix of its own, of any mixture of formats, in equal shares for P programs. Their
   streams are put behind one another, with slices of one width, so that one kernel reads them all.
2. `route` sorts the choices by expert. An expert then has a run of activations, which its programs take 8 at a time;
   experts without any cost nothing. All tables have shapes that depend on nothing but those of `choice`, so that a
   decoder with experts is one CUDA graph.
3. Sums of pieces are added as for a single matrix, with SwiGLU in the same launch where rows are gates and `up`.

The specification is `expert_linear_twin`. More than 32 tokens are computed that way too: expert after expert.
"""

from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import places_of
from .layout import Part, lay_out
from .product import has_triton
from .slices import CHUNK, TILE_ROWS, SliceForm, SliceMatrix, slice_weight

MOST_TOKENS = 32
"""Tokens up to which packed weights are read."""


class Experts(NamedTuple):
    """The matrices [rows, cols] of all experts; the first four as in `SliceMatrix`."""

    words: Tensor
    scales: Tensor
    zeros: Tensor
    pieces: Tensor
    programs: Tensor
    """int32 [experts, P + 1]: the first piece of each program of an expert"""
    tiles: Tensor
    """int32 [tiles of all experts, 2]: first piece and the one behind the last"""
    places: Tensor
    """int32 [experts, rows]: where in the tiles of all experts a row lies"""
    form: SliceForm
    """`rows` are those of one expert"""


class Route(NamedTuple):
    """Choices sorted by expert."""

    order: Tensor
    """int32 [choices]: which choice comes at which place"""
    starts: Tensor
    """int32 [experts + 1]: the first place of each expert"""
    active: Tensor
    """int32 [min(experts, choices)]: the experts that are chosen, then others"""


def stack_experts(
    experts: Sequence[Sequence[Part]],
    *,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    programs: int = 64,
    widest: int = 128,
) -> Experts:
    """Lays out the experts, each a list of parts along rows that fill [rows, cols]; `programs` is P.

    ValueError for parts on a trellis, and as `lay_out` raises it.
    """
    like = [part for parts in experts for part in parts]
    found: dict[str, list[Tensor]] = {name: [] for name in Experts._fields[:-1]}
    words = scales = pieces = tiles = 0
    forms: list[SliceForm] = []
    for parts in experts:
        if any(part.source is not None for part in parts):
            raise ValueError("experts on a trellis: decode them to 16 bits first")
        one = lay_out(
            parts, axis="rows", rows=rows, cols=cols, dtype=dtype, programs=programs, widest=widest, like=like
        )
        forms.append(one.form)
        table = one.pieces.clone()
        table[:, 1] += words // CHUNK
        table[:, 2] += scales
        table[:, 6] += scales
        short = programs + 1 - len(one.programs)
        found["programs"].append(F.pad(one.programs, (0, short), value=len(table)) + pieces)
        found["tiles"].append(torch.stack([one.tiles[:-1], one.tiles[1:]], 1) + pieces)
        found["places"].append(places_of(one) + tiles * TILE_ROWS)
        found["pieces"].append(table)
        for name in ("words", "scales", "zeros"):
            found[name].append(getattr(one, name))
        words += len(one.words)
        scales += len(one.scales)
        pieces += len(table)
        tiles += len(one.order)
    stacked = {name: torch.stack(found.pop(name)) for name in ("programs", "places")}
    joined = {name: torch.cat(tables) for name, tables in found.items()}
    kinds = reduce(or_, (form.kinds for form in forms))
    return Experts(**joined, **stacked, form=forms[0]._replace(kinds=kinds))


def expert_weight(experts: Experts, index: int) -> Tensor:
    """The weights float32 [rows, cols] of one expert."""
    first, last = int(experts.programs[index, 0]), int(experts.programs[index, -1])
    pieces = experts.pieces[first:last].clone()
    own = pieces[:, 7].unique()
    inside = experts.places[index] - experts.places[index].min() // TILE_ROWS * TILE_ROWS
    order = torch.full((len(own) * TILE_ROWS,), -1, dtype=torch.int32, device=pieces.device)
    order[inside.long()] = torch.arange(experts.form.rows, dtype=torch.int32, device=pieces.device)
    nothing = torch.zeros(0, dtype=torch.int32, device=pieces.device)
    matrix = SliceMatrix(
        experts.words, experts.scales, experts.zeros, pieces, nothing, nothing, order.view(-1, TILE_ROWS), nothing,
        experts.form,
    )  # fmt: skip
    return slice_weight(matrix)


def route(choice: Tensor, experts: int) -> Route:
    """The tables of `choice` int [tokens, k]."""
    flat = choice.flatten().long()
    counts = torch.zeros(experts, dtype=torch.long, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    starts = F.pad(counts.cumsum(0), (1, 0))
    active = (counts == 0).long().argsort(stable=True)[: min(experts, len(flat))]
    return Route(flat.argsort(stable=True).int(), starts.int(), active.int())


def expert_linear(x: Tensor, experts: Experts, choice: Tensor, *, gated: bool = False) -> Tensor:
    """`expert_linear_twin` on any device."""
    return expert_linear_op(x, list(experts[:-1]), choice, gated, list(experts.form))


def expert_linear_twin(x: Tensor, experts: Experts, choice: Tensor, *, gated: bool = False) -> Tensor:
    """[tokens, k, rows] (half as many if `gated`) in the type of x, for `choice` [tokens, k].

    x is [tokens, cols], or [tokens * k, cols] with activations of every choice.
    """
    tokens, k = choice.shape
    each = x if len(x) == tokens * k else x.repeat_interleave(k, 0)
    y = x.new_empty(tokens * k, experts.form.rows // (2 if gated else 1))
    flat = choice.flatten()
    for index in flat.unique().tolist():
        rows = (flat == index).nonzero()[:, 0]
        total = each[rows].float() @ expert_weight(experts, index).T
        if gated:
            gate, up = total.chunk(2, 1)
            total = F.silu(gate) * up
        y[rows] = total.to(x.dtype)
    return y.view(tokens, k, -1)


@torch.library.custom_op("circuitpress::expert_linear", mutates_args=())
def expert_linear_op(x: Tensor, tensors: list[Tensor], choice: Tensor, gated: bool, form: list[int]) -> Tensor:
    """`expert_linear`, with the fields of its tuples one by one."""
    return expert_linear_twin(x, _experts(tensors, form), choice, gated=gated)


@expert_linear_op.register_fake
def _shape(x: Tensor, tensors: list[Tensor], choice: Tensor, gated: bool, form: list[int]) -> Tensor:
    del tensors
    return x.new_empty(*choice.shape, form[0] // (2 if gated else 1))


@expert_linear_op.register_kernel("cuda")
def _on_a_gpu(x: Tensor, tensors: list[Tensor], choice: Tensor, gated: bool, form: list[int]) -> Tensor:
    experts = _experts(tensors, form)
    if not has_triton() or not 0 < len(choice) <= MOST_TOKENS:
        return expert_linear_twin(x, experts, choice, gated=gated)
    from .experts_triton import expert_product

    return expert_product(x, experts, choice, gated=gated)


def _experts(tensors: list[Tensor], form: list[int]) -> Experts:
    return Experts(*tensors, form=SliceForm(*form[:-1], bfloat=bool(form[-1])))
