"""y = x W^T + b for a matrix laid out in slices: the torch operator, with what it does on each device.

On a GPU Triton's kernels compute it (launch_triton.py); everywhere else the twin of slices.py, which decodes the whole
matrix at every call: a CPU, and a GPU without Triton, have faster forms of their own (`circuitpress.runtime`).

Nothing in torch takes a matrix of several formats, and its int4 operators on a GPU take neither zeros that are whole
numbers nor any number of columns.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .slices import SliceForm, SliceMatrix, slice_linear_twin


def slice_linear(x: Tensor, matrix: SliceMatrix, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias [batch, rows] for x [batch, cols] (bfloat16, float16 or float32), in the type of `x`.

    Products are summed in float32. Above 32 rows of `x` on a GPU weights are rounded to its type.
    """
    return slice_linear_op(x, list(matrix[:-1]), bias, *matrix.form)


@torch.library.custom_op("circuitpress::slice_linear", mutates_args=())
def slice_linear_op(
    x: Tensor,
    tensors: list[Tensor],
    bias: Tensor | None,
    rows: int,
    cols: int,
    size: int,
    kinds: int,
    shift: int,
    bfloat: bool,
) -> Tensor:
    """`slice_linear`, with the fields of `SliceMatrix` and of `SliceForm` one by one: operators take no tuples."""
    return slice_linear_twin(x, SliceMatrix(*tensors, form=SliceForm(rows, cols, size, kinds, shift, bfloat)), bias)


@slice_linear_op.register_fake
def _shape(
    x: Tensor,
    tensors: list[Tensor],
    bias: Tensor | None,
    rows: int,
    cols: int,
    size: int,
    kinds: int,
    shift: int,
    bfloat: bool,
) -> Tensor:
    del tensors, bias, cols, size, kinds, shift, bfloat
    return x.new_empty(x.shape[0], rows)


@slice_linear_op.register_kernel("cuda")
def _on_a_gpu(
    x: Tensor,
    tensors: list[Tensor],
    bias: Tensor | None,
    rows: int,
    cols: int,
    size: int,
    kinds: int,
    shift: int,
    bfloat: bool,
) -> Tensor:
    matrix = SliceMatrix(*tensors, form=SliceForm(rows, cols, size, kinds, shift, bfloat))
    if not x.shape[0] or not has_triton():
        return slice_linear_twin(x, matrix, bias)
    from .launch_triton import slice_product

    return slice_product(x, matrix, bias)


@cache
def has_triton() -> bool:
    """Whether Triton is installed: it has wheels for Linux only."""
    return find_spec("triton") is not None
