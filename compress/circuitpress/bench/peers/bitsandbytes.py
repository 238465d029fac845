# pyright: reportMissingImports=false
"""bitsandbytes NF4: a fixed table of 16 quantiles, one float32 maximum for every 64 weights of the flattened matrix.

Dettmers et al. 2023, https://arxiv.org/abs/2305.14314. `double` quantizes the maxima to 8 bits in blocks of 256. Codes
are decoded here: version 0.50.2's own `dequantize_4bit` is wrong on a CPU where the inputs are a multiple of 32 but not
of 64 (352 inputs: relative error 0.2 instead of 0.09).
"""

from collections.abc import Mapping
from typing import Any

import torch

from .protocol import Job, Kept

BLOCK, NESTED = 64, 256


def quantize(job: Job) -> Mapping[str, Kept]:
    """`options`: type (`nf4` or `fp4`), double (False)."""
    from bitsandbytes.functional import dequantize_blockwise, quantize_4bit

    double = job.options.get("double", False)
    found = {}
    for name, linear in job.linears(job.load()).items():
        rows, cols = job.matrices[name]
        weight = linear.weight.detach().float().contiguous()
        with job.timed():
            stored: Any = quantize_4bit(
                weight, blocksize=BLOCK, compress_statistics=double, quant_type=job.options.get("type", "nf4")
            )
        packed, state = stored
        absmax = state.absmax
        if double:
            absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
        pairs = packed.flatten().int()
        codes = torch.stack([pairs >> 4, pairs & 15], 1).flatten()[: rows * cols]
        spread = absmax.float().repeat_interleave(BLOCK)[: rows * cols]
        blocks = -(-rows * cols // BLOCK)
        side = blocks + 4 * -(-blocks // NESTED) + 4 if double else 4 * blocks
        decoded = (state.code.float()[codes] * spread).view(rows, cols)
        found[name] = Kept(decoded, -(-rows * cols // 2) + side)
    return found
