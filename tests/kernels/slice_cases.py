"""Runs the kernels of slices on odd shapes and prints one json line a case; not a test, but what two tests run.

`python slice_cases.py cpu` with TRITON_INTERPRET=1 set goes through Triton's interpreter, `python slice_cases.py cuda`
through a GPU, where it launches every case twice and adds larger ones unless `small` follows (for compute-sanitizer).

Outputs are poisoned with NaN before the launch, and so is everything around the activations: what is not written, or
read but not masked, shows.
"""

import json
import sys
from collections.abc import Callable, Iterator
from itertools import cycle, product

import torch
from matrices import KINDS, RINGS, WHOLE, Cut, matrix
from torch import Tensor

from circuitpress_kernels import BOOK, DENSE, SliceMatrix, slice_linear_twin
from circuitpress_kernels.launch_triton import MOST_ROWS, slice_product

Case = tuple[str, int, list[Cut], int, torch.dtype]
MIXTURES = (
    [Cut(20, 4, 64), Cut(33, 2, 64, 9), Cut(17, DENSE)],
    [Cut(48, 3, 32, 40), Cut(48, 8, 32), Cut(76, 4, 32)],
    [Cut(30, BOOK + 2, WHOLE), Cut(30, 5, WHOLE, 3), Cut(40, BOOK + 3, WHOLE)],
    [Cut(64, 6, 32), Cut(1, 4, 32), Cut(35, 6, 32)],
)


def cases(*, large: bool) -> Iterator[Case]:
    """(axis, size across, parts, rows of activations, their type)."""
    types = cycle((torch.float16, torch.bfloat16))
    batches = cycle((1, 8, 3, 32, 9, 33))
    for kind, group in product(KINDS, (64, WHOLE)):
        if kind != DENSE or group == 64:
            yield "rows", 172, [Cut(35, kind, group)], next(batches), next(types)
    for cuts, axis in product(MIXTURES, ("rows", "cols")):
        for batch in (1, 9, 40):
            yield axis, 70 if axis == "cols" else 130, cuts, batch, next(types)
    for kind in RINGS:
        yield "rows", 172, [Cut(32, kind), Cut(9, 3, 32), Cut(32, kind)], next(batches), next(types)
    yield "cols", 64, [Cut(36, RINGS[0]), Cut(40, RINGS[1]), Cut(16, 4, 16, 5)], 3, torch.float16
    yield "rows", 171, [Cut(3, 4, 64)], 5, torch.float32
    yield "rows", 256, [Cut(64, 4, 128)], 2, torch.float16
    if large:
        for kind, batch in product((*KINDS, *RINGS), (1, 7, 17, 200)):
            yield "rows", 4096, [Cut(1024, kind, 128), Cut(24, 4, 128)], batch, next(types)
            yield "cols", 1024, [Cut(2048, kind, 128), Cut(1024, 2, 128, 500), Cut(1000, DENSE)], batch, next(types)


def run(axis: str, across: int, cuts: list[Cut], batch: int, dtype: torch.dtype, device: str) -> dict[str, object]:
    dense = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    laid_out, weight = matrix(axis, across, cuts, dtype=dense, seed=batch)
    rows, cols = weight.shape
    around = torch.full((batch + 2, cols + 5), float("nan"), dtype=dtype, device=device)
    x = around[1:-1, 2 : cols + 2]
    x.copy_(torch.randn(batch, cols))
    bias = torch.randn(rows).to(dtype).to(device) if batch % 2 else None
    there = SliceMatrix(*(tensor.to(device) for tensor in laid_out[:-1]), form=laid_out.form)
    y = poisoned(lambda: slice_product(x, there, bias))
    again = slice_product(x, there, bias) if device == "cuda" else y
    twin = slice_linear_twin(x.cpu(), laid_out, None if bias is None else bias.cpu())
    exact = x.cpu().double() @ weight.T + (0 if bias is None else bias.cpu().double())
    # Half a unit in the last place of the result (one in bfloat16, which the interpreter truncates); what summing in
    # float32 may lose; weights that were rounded.
    eps, size = torch.finfo(dtype).eps, x.cpu().double().abs() @ weight.abs().T
    allowed = exact.abs() * eps / (1 if dtype == torch.bfloat16 else 2) + size * (
        1e-6 + (eps / 2 if batch > MOST_ROWS else 0)
    )
    error = (y.cpu().double() - exact).abs().nan_to_num(nan=float("inf"))
    return {
        "case": f"{axis} {rows}x{cols} {[tuple(cut) for cut in cuts]} batch {batch} {dtype}",
        "type": str(dtype).removeprefix("torch."),
        "error": (error.norm() / exact.norm()).item(),
        "beyond": (error / allowed).max().item(),
        "from_twin": ((y.cpu().double() - twin.double()).norm() / exact.norm()).item(),
        "right_form": list(y.shape) == [batch, rows] and y.dtype == dtype,
        "same_again": torch.equal(y, again),
    }


def poisoned(launch: Callable[[], Tensor]) -> Tensor:
    """Calls `launch` while the tensors of numbers that its wrapper allocates start as NaN."""
    new_empty, empty = torch.Tensor.new_empty, torch.empty

    def spoilt(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    torch.Tensor.new_empty = lambda self, *size, **options: spoilt(new_empty(self, *size, **options))
    torch.empty = lambda *size, **options: spoilt(empty(*size, **options))
    try:
        return launch()
    finally:
        torch.Tensor.new_empty, torch.empty = new_empty, empty


if __name__ == "__main__":
    torch.set_num_threads(1)
    device, *rest = sys.argv[1:]
    for case in cases(large=device == "cuda" and "small" not in rest):
        sys.stdout.write(json.dumps(run(*case, device)) + "\n")
