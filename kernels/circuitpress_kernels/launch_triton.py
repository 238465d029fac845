"""Launches the kernels of `slice_linear`, with the constants that they are compiled for.

| rows of activations | what runs |
|---|---|
| 1 to 8 | one pass over the packed weights |
| 9 to 32 | a pass for every 8 (AMD: 16), side by side, so that weights come from memory once and from the cache again |
| more | weights are decoded to a scratch matrix that torch multiplies with |

Wider passes spill registers: with 16 rows 16 bytes at 4 bits, 88 at 3. The bound of 32 is an estimate: at 4 bits four
passes spend as many instructions as dense 16-bit weights take time to be read. No device was at hand to measure it.

Triton's interpreter computes bfloat16 silently wrong: there the operands are widened to float32 first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from .decode_triton import decode_pieces, gather_activations
from .launches import Launch, choose, default
from .slices import KINDS, SPARSE, TILE_ROWS, SliceForm, SliceMatrix, fields_of
from .slices_triton import add_pieces, slice_pieces

MOST_ROWS = 32
"""Rows of activations for which packed weights are read."""
# Fused multiply-adds are Triton's default until 3.10; unsaid, 3.9 warns.
OTHER_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
_GATHERED = 1024
"""Activations that one program gathers."""


def slice_product(x: Tensor, matrix: SliceMatrix, bias: Tensor | None) -> Tensor:
    """`slice_linear` on the device of `x`, for any batch of 1 or more. Shapes as there."""
    form, batch = matrix.form, x.shape[0]
    if batch > MOST_ROWS:
        x = _gathered(x, matrix)
        weight = slice_scratch(matrix, x.shape[1], x.dtype)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    partials, passes, lanes = slice_partials(x, matrix)
    y = x.new_empty(batch, form.rows)
    add_pieces[(len(matrix.order), passes)](
        partials, matrix.tiles, matrix.order, partials if bias is None else bias, y, batch, form.rows,
        ROWS=TILE_ROWS, BATCH=lanes, BIAS=bias is not None, **OTHER_OPTIONS,
    )  # fmt: skip
    return y


def slice_partials(x: Tensor, matrix: SliceMatrix) -> tuple[Tensor, int, int]:
    """The sums of all pieces, float32 [pieces, passes * rows of a pass, 32]; passes; rows of a pass."""
    x, batch = _gathered(x, matrix), x.shape[0]
    hip = torch.version.hip is not None
    lanes = rows_of_a_pass(hip)
    passes = triton.cdiv(batch, lanes)
    partials = x.new_empty(len(matrix.pieces), passes * lanes, TILE_ROWS, dtype=torch.float32)
    slice_pieces[(passes, len(matrix.programs) - 1)](
        x, x.stride(0), batch, x.shape[1], *matrix[:5], partials,
        **constants(matrix.form, x.dtype, hip, even=matrix.columns.numel() > 0),
        **options(launch_for(x, matrix.form, hip)),
    )  # fmt: skip
    return partials, passes, lanes


def _gathered(x: Tensor, matrix: SliceMatrix) -> Tensor:
    """Activations in the order of the matrix, with unit stride."""
    if matrix.columns.numel():
        return _gather(x, matrix.columns)
    return x if x.stride(1) == 1 else x.contiguous()


def rows_of_a_pass(hip: bool) -> int:
    """Rows of activations of one pass: the N of the smallest tensor-core instruction."""
    return 16 if hip else 8


def options(launch: Launch) -> dict[str, object]:
    """What Triton is told of a launch of `slice_pieces`."""
    return {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}


def launch_for(x: Tensor, form: SliceForm, hip: bool) -> Launch:
    """The launch (launches.py) of a product with `x` on its device."""
    if x.device.type != "cuda":  # the interpreter
        return default(form.kinds, hip=hip)
    name = torch.cuda.get_device_name(x.device)
    return choose(name, form.kinds, rows=x.shape[0], weights=form.rows * form.cols, hip=hip)


def constants(form: SliceForm, dtype: torch.dtype, hip: bool, *, even: bool) -> dict[str, object]:
    """The constants of `slice_pieces` for activations of `dtype`; `even` if there is one for every column of slices."""
    interpreted = knobs.runtime.interpret
    dot = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(dtype, tl.float32)
    wide = form.size * max(fields_of(kind) for kind in range(2, KINDS) if form.kinds >> kind & 1)
    return {
        "KINDS": form.kinds, "ROWS": TILE_ROWS, "SIZE": form.size, "BATCH": rows_of_a_pass(hip),
        "EVEN": even or form.cols % wide == 0, "SHIFT": form.shift, "BFLOAT": form.bfloat,
        "ASM": not interpreted and not hip and dtype != torch.float32,
        "DOT": tl.float32 if interpreted and dtype == torch.bfloat16 else dot,
    }  # fmt: skip


def slice_scratch(matrix: SliceMatrix, cols: int, dtype: torch.dtype) -> Tensor:
    """The weights [rows, cols] in `dtype`, in the order of gathered activations where those are gathered."""
    form = matrix.form
    weight = torch.empty(form.rows, cols, dtype=dtype, device=matrix.words.device)
    for kinds in (form.kinds & ~(1 << SPARSE), form.kinds & (1 << SPARSE)):
        if kinds:
            decode_pieces[(len(matrix.pieces),)](
                *matrix[:4], matrix.order, weight, cols, KINDS=kinds, ROWS=TILE_ROWS, SIZE=form.size, SHIFT=form.shift,
                BFLOAT=form.bfloat, **OTHER_OPTIONS,
            )  # fmt: skip
    return weight


def _gather(x: Tensor, columns: Tensor) -> Tensor:
    gathered = x.new_empty(x.shape[0], len(columns))
    grid = (triton.cdiv(len(columns), _GATHERED), x.shape[0])
    if x.stride(1) != 1:
        x = x.contiguous()
    gather_activations[grid](
        x,
        x.stride(0),
        columns,
        gathered,
        len(columns),
        BLOCK=_GATHERED,
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=True,
    )
    return gathered
