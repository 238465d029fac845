# pyright: reportMissingImports=false
"""HQQ: half-quadratic fit of the zero points, without data (https://mobiusml.github.io/hqq_blog).

Groups run over the flattened matrix, which need not divide a row; scale and zero point are float16.
"""

from collections.abc import Mapping

import torch

from .protocol import Job, Kept, affine_bytes


def quantize(job: Job) -> Mapping[str, Kept]:
    """`options`: axis (1, the package's default)."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=job.bits, group_size=job.group_size, axis=job.options.get("axis", 1))
    found = {}
    for name, linear in job.linears(job.load()).items():
        rows, cols = job.matrices[name]
        with job.timed(), torch.no_grad():
            layer = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
        nbytes = affine_bytes(1, rows * cols, job.bits, job.group_size, zero_bits=16)
        found[name] = Kept(layer.dequantize().detach().float().reshape(rows, cols), nbytes)
    return found
