"""Runs the kernels of experts on odd shapes and prints one json line a case; what two tests run.

`python expert_cases.py cpu` with TRITON_INTERPRET=1 set goes through Triton's interpreter, `python expert_cases.py
cuda` through a GPU. Outputs, and what surrounds the activations, are poisoned.
"""

import json
import sys

import torch
from matrices import Cut, part
from slice_cases import poisoned

from circuitpress_kernels import BOOK, DENSE
from circuitpress_kernels.experts import Experts, expert_linear_twin, stack_experts
from circuitpress_kernels.experts_triton import expert_product

Layer = list[list[Cut]]
ALIKE: Layer = [[Cut(38, 4, 64)]] * 5
MIXED: Layer = [
    [Cut(20, 4, 32), Cut(30, 2, 32)], [Cut(50, 3, 32, 9)], [Cut(50, DENSE)], [Cut(17, 8, 32), Cut(33, BOOK + 2, 32)],
]  # fmt: skip
CASES = [
    (ALIKE, 172, 1, 2, torch.float16, "gated"),
    (ALIKE, 256, 9, 1, torch.bfloat16, ""),
    (MIXED, 96, 3, 2, torch.float16, "gated"),
    (MIXED, 172, 32, 3, torch.bfloat16, "own gated"),
    (MIXED, 70, 5, 4, torch.float16, "own"),
    (MIXED, 171, 2, 1, torch.float32, ""),
]
"""Experts, columns, tokens, choices of a token, type, extras: `own` activations of every choice."""


def layer(cuts: Layer, cols: int, dtype: torch.dtype, programs: int) -> tuple[Experts, torch.Tensor]:
    """Random experts and their weights in float64 [experts, rows, cols]."""
    experts, weights, total = [], [], sum(cut.length for cut in cuts[0])
    for own in cuts:
        parts, start, rows = [], 0, []
        for cut in own:
            made, weight = part(cut, start, cut.length, cols)
            parts.append(made)
            rows.append(weight)
            start += cut.length
        experts.append(parts)
        weights.append(torch.cat(rows))
    dense = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    return stack_experts(experts, rows=total, cols=cols, dtype=dense, programs=programs), torch.stack(weights)


def run(cuts: Layer, cols: int, tokens: int, k: int, dtype: torch.dtype, extras: str, device: str) -> dict:
    torch.manual_seed(cols + tokens)
    experts, weights = layer(cuts, cols, dtype, programs=3)
    choice = torch.stack([torch.randperm(len(cuts))[:k] for _ in range(tokens)])
    count = tokens * k if "own" in extras else tokens
    around = torch.full((count + 2, cols + 5), float("nan"), dtype=dtype, device=device)
    x = around[1:-1, 2 : cols + 2]
    x.copy_(torch.randn(count, cols))
    gated = "gated" in extras
    there = Experts(*(tensor.to(device) for tensor in experts[:-1]), form=experts.form)
    y = poisoned(lambda: expert_product(x, there, choice.to(device), gated=gated))
    twin = expert_linear_twin(x.cpu(), experts, choice, gated=gated).double()
    each = x.cpu().double() if "own" in extras else x.cpu().double().repeat_interleave(k, 0)
    exact = torch.einsum("crk,ck->cr", weights[choice.flatten()], each)
    if gated:
        gate, up = exact.chunk(2, 1)
        exact = gate * torch.sigmoid(gate) * up
    exact = exact.view(tokens, k, -1)
    found = y.cpu().double().nan_to_num(nan=float("inf"))
    return {
        "case": f"{len(cuts)} experts of {cols} columns, {tokens} tokens, {k} each, {dtype} {extras}",
        "type": str(dtype).removeprefix("torch."),
        "error": ((found - exact).norm() / exact.norm()).item(),
        "from_twin": ((found - twin).norm() / exact.norm()).item(),
        "right_form": y.shape == exact.shape and y.dtype == dtype,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in CASES:
        sys.stdout.write(json.dumps(run(*case, sys.argv[1])) + "\n")
