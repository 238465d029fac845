"""Runs products with what stands around them on odd shapes and prints one json line a case; what two tests run.

`python fused_cases.py cpu` with TRITON_INTERPRET=1 set goes through Triton's interpreter, `python fused_cases.py cuda`
through a GPU. Outputs and what surrounds the activations are poisoned.
"""

import json
import sys
from collections.abc import Iterator

import torch
from matrices import Cut, matrix
from slice_cases import poisoned

from circuitpress_kernels import BOOK, DENSE, SliceMatrix
from circuitpress_kernels.fused import Around, Turn, fused_linear_twin, places_of
from circuitpress_kernels.fused_launch_triton import fused_product

Case = tuple[str, int, list[Cut], int, torch.dtype, str]


def cases() -> Iterator[Case]:
    """(axis, size across, parts, rows of activations, their type, what stands around)."""
    half, brain = torch.float16, torch.bfloat16
    rows = [Cut(20, 4, 64), Cut(33, 2, 64, 9), Cut(17, DENSE)]
    yield "rows", 172, rows, 1, half, "norm"
    yield "rows", 172, rows, 3, brain, "norm gated"
    yield "rows", 172, rows, 9, half, "norm gated bias"
    yield "rows", 172, rows, 40, half, "norm gated bias residual"
    yield "cols", 70, [Cut(48, 3, 32, 40), Cut(48, 8, 32), Cut(76, 4, 32)], 8, brain, "residual"
    yield "cols", 70, [Cut(48, 3, 32, 40), Cut(48, 8, 32), Cut(76, 4, 32)], 2, half, "residual bias"
    yield "rows", 256, [Cut(65, BOOK + 3, 64), Cut(65, 6, 32)], 5, half, "norm gated turn"
    yield "rows", 256, [Cut(130, 4, 64)], 32, brain, "turn residual"
    yield "rows", 352, [Cut(70, 4, 32)], 2, half, "norm turn bias"
    yield "rows", 171, [Cut(3, 4, 64)], 5, torch.float32, "norm residual"


def run(axis: str, across: int, cuts: list[Cut], batch: int, dtype: torch.dtype, extras: str, device: str) -> dict:
    generator = torch.Generator().manual_seed(batch + across)
    dense = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    laid_out, weight = matrix(axis, across, cuts, dtype=dense, seed=batch)
    rows, cols = weight.shape
    turn = None
    if "turn" in extras:  # the last columns of the matrix meet the first ones of x, rotated
        turned = 128 if cols == 256 else 96
        cols -= turned
        signs, strips = torch.randn(turned, generator=generator).sign(), torch.rand(turned, generator=generator)
        block = 128 if turned == 128 else 32
        turn = Turn(torch.arange(turned, dtype=torch.int32), torch.stack([signs, strips]), block)
    out = rows // 2 if "gated" in extras else rows
    around = Around(
        (1 + torch.randn(cols, generator=generator) / 4).to(dtype) if "norm" in extras else None,
        1e-5,
        turn,
        torch.randn(rows, generator=generator).to(dtype) if "bias" in extras else None,
        torch.randn(batch, out, generator=generator).to(dtype) if "residual" in extras else None,
        "gated" in extras,
    )
    surrounded = torch.full((batch + 2, cols + 5), float("nan"), dtype=dtype, device=device)
    x = surrounded[1:-1, 2 : cols + 2]
    x.copy_(torch.randn(batch, cols, generator=generator))
    there = SliceMatrix(*(tensor.to(device) for tensor in laid_out[:-1]), form=laid_out.form)
    moved = around._replace(
        **{
            name: value.to(device)
            for name in ("gain", "bias", "residual")
            if (value := getattr(around, name)) is not None
        }
    )
    if turn is not None:
        moved = moved._replace(turn=Turn(turn.sources.to(device), turn.factors.to(device), turn.block))
    y = poisoned(lambda: fused_product(x, there, places_of(there), moved))
    twin = fused_linear_twin(x.cpu(), laid_out, around).double()
    exact = in_float64(x.cpu().double(), weight.double(), around)
    found = y.cpu().double().nan_to_num(nan=float("inf"))
    return {
        "case": f"{axis} {rows}x{cols} batch {batch} {dtype} {extras}",
        "type": str(dtype).removeprefix("torch."),
        "error": ((found - exact).norm() / exact.norm()).item(),
        "from_twin": ((found - twin).norm() / exact.norm()).item(),
        "right_form": list(y.shape) == [batch, out] and y.dtype == dtype,
    }


def in_float64(x: torch.Tensor, weight: torch.Tensor, around: Around) -> torch.Tensor:
    """The formula, without any rounding."""
    if around.gain is not None:
        x = x / (x.square().mean(1, keepdim=True) + around.eps).sqrt() * around.gain.double()
    if around.turn is not None:
        size = around.turn.block
        matrix = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]).double()
        before, after = around.turn.factors.double()
        parts = (x[:, around.turn.sources.long()] * before).unflatten(1, (-1, size)) @ matrix / size**0.5
        x = torch.cat([x, parts.flatten(1) * after], 1)
    y = x @ weight.T
    if around.bias is not None:
        y = y + around.bias.double()
    if around.gated:
        gate, up = y.chunk(2, 1)
        y = gate * torch.sigmoid(gate) * up
    return y if around.residual is None else y + around.residual.double()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in cases():
        sys.stdout.write(json.dumps(run(*case, sys.argv[1])) + "\n")
