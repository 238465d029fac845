"""Runs the Triton kernel on odd shapes and prints one json line a case; not a test, but what two tests run.

`python int4_cases.py cpu` with TRITON_INTERPRET=1 set goes through Triton's interpreter, `python int4_cases.py cuda`
through a GPU. A process of its own, because the interpreter is chosen when the kernel is decorated, and because the
type checks that the tests put around every function would reach into the kernel.

Outputs are poisoned with NaN before the launch, and so is everything around the activations: what is not written, or
read but not masked, shows.
"""

import json
import sys
from itertools import product

import torch

from circuitpress_kernels import int4, int4_triton

SHAPES = ((64, 64), (70, 172), (1, 171), (130, 700), (64, 33))
BATCHES = (1, 3, 8)


def main(device: str) -> None:
    torch.set_num_threads(1)
    for (rows, cols), group_size in product(SHAPES, int4.GROUP_SIZES):
        for batch, dtype in zip(BATCHES, (torch.bfloat16, torch.float16, torch.float32), strict=True):
            sys.stdout.write(json.dumps(run(rows, cols, group_size, batch, dtype, device)) + "\n")


def run(rows: int, cols: int, group_size: int, batch: int, dtype: torch.dtype, device: str) -> dict[str, object]:
    torch.manual_seed(rows * cols + group_size)
    groups = -(-cols // group_size)
    codes = torch.randint(0, 16, (rows, cols), dtype=torch.uint8)
    zeros = torch.randint(0, 16, (rows, groups), dtype=torch.uint8)
    scales = (torch.rand(rows, groups) * 0.1).half()
    around = torch.full((batch + 2, cols + 5), float("nan"), dtype=dtype, device=device)
    x = around[1:-1, 2 : cols + 2]
    x.copy_(torch.randn(batch, cols))

    tiles = [part.to(device) for part in int4.int4_tiles(codes, scales, zeros, group_size=group_size)]
    y = poisoned(lambda: int4_triton.int4_gemv(x, *tiles, rows)).cpu()
    twin = int4.int4_linear_twin(x, *tiles, rows).cpu()

    column = torch.arange(cols) // group_size
    weight = (codes.double() - zeros.double()[:, column]) * scales.double()[:, column]
    exact = x.cpu().double() @ weight.T
    size = x.cpu().double().abs() @ weight.abs().T
    # Half a unit in the last place of the result, and what summing in float32 may lose.
    allowed = exact.abs() * torch.finfo(dtype).eps / 2 + size * 1e-6
    return {
        "case": f"{rows}x{cols} g{group_size} batch {batch} {dtype}",
        "error": ((y.double() - exact).abs() / allowed).nan_to_num(nan=float("inf")).max().item(),
        "twin": ((twin.double() - exact).abs() / allowed).nan_to_num(nan=float("inf")).max().item(),
        "right_form": list(y.shape) == [batch, rows] and y.dtype == dtype,
    }


def poisoned(launch):
    """Calls `launch` while the tensors of numbers that its wrapper allocates start as NaN."""
    plain = torch.Tensor.new_empty

    def new_empty(self, *size, **options):
        tensor = plain(self, *size, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    torch.Tensor.new_empty = new_empty
    try:
        return launch()
    finally:
        torch.Tensor.new_empty = plain


if __name__ == "__main__":
    main(sys.argv[1])
