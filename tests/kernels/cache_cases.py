"""Runs the kernel that reads packed caches on odd shapes and prints one json line a case; what two tests run.

`python cache_cases.py cpu` with TRITON_INTERPRET=1 set goes through Triton's interpreter, `python cache_cases.py cuda`
through a GPU. Outputs and what surrounds the codes are poisoned.
"""

import json
import sys

import torch
from slice_cases import poisoned

from circuitpress_kernels.kv import CacheForm, CacheRows, head_table, pack_cache, read_cache_twin
from circuitpress_kernels.kv_triton import read_rows

CASES = [
    ((4,), 64, 64, 1, 1, torch.float16),
    ((8, 4, 16, 3), 128, 64, 2, 2, torch.bfloat16),
    ((2, 5, 6), 6, 32, 3, 3, torch.float16),
    ((16, 2, 16), 10, 16, 1, 5, torch.float32),
    ((16, 16), 40, 16, 2, 3, torch.bfloat16),
    ((3, 8, 5, 6, 2), 80, 64, 2, 1, torch.bfloat16),
]
"""Bits of heads, channels, tokens of a group, sequences, groups, type."""


def main(device: str) -> None:
    for seed, (bits, dim, group, batch, groups, dtype) in enumerate(CASES):
        generator = torch.Generator().manual_seed(seed)
        form, tokens = CacheForm(bits, dim, group), groups * group
        numbers = torch.randn(batch, len(bits), tokens + group, dim, generator=generator).to(dtype)
        whole = pack_cache(numbers, form)
        scales = whole.scales.clone()
        scales[:, groups:] = float("nan")  # a group that lies behind what is read
        rows = CacheRows(whole.codes[:, :tokens], scales[:, :groups])
        twin = read_cache_twin(rows, form, dtype)
        there = CacheRows(*(tensor.to(device) for tensor in (whole.codes, scales)))
        there = CacheRows(there.codes[:, :tokens], there.scales[:, :groups])
        table = head_table(form).to(device)
        found = poisoned(lambda r=there, f=form, t=table, d=dtype: read_rows(r, f, t, d))
        error = (found.cpu().float() - twin.float()).abs().nan_to_num(nan=float("inf"))
        # The interpreter truncates to bfloat16; a product and a sum may be fused on a device.
        allowed = twin.float().abs() * torch.finfo(dtype).eps + 1e-6
        line = {"case": f"{bits} {dim} {dtype}", "beyond": (error / allowed).max().item()}
        sys.stdout.write(json.dumps(line | {"right_form": found.shape == twin.shape and found.dtype == dtype}) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
