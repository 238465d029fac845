# pyright: reportMissingImports=false
"""torchao's IntxWeightOnlyConfig: affine groups from minimum and maximum, or its HQQ variant (scale only).

https://docs.pytorch.org/ao/stable/. Files hold every code as one int8 whatever its width; counted are packed codes,
a float16 scale and, unless the mapping is symmetric, a zero point of the codes' width.
"""

from collections.abc import Mapping

import torch

from .protocol import Job, Kept, affine_bytes


def quantize(job: Job) -> Mapping[str, Kept]:
    """`options`: algorithm (`affine` or `hqq_scale_only`), sym (False). Rows that no group divides get one scale."""
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
    from torchao.quantization.quant_primitives import MappingType

    model = job.load()
    symmetric = job.options.get("sym", False) or job.options.get("algorithm") == "hqq_scale_only"
    by_group: dict[int, set[str]] = {}
    for name, (_, cols) in job.matrices.items():
        by_group.setdefault(job.group(cols), set()).add(name)
    for group, names in by_group.items():
        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{job.bits}"),
            granularity=PerGroup(group) if group else PerAxis(0),
            mapping_type=MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
            scale_dtype=torch.float16,
            intx_choose_qparams_algorithm=job.options.get("algorithm", "affine"),
        )
        with job.timed():
            quantize_(model, config, lambda _, name, names=names: name in names)
    found = {}
    for name, linear in job.linears(model).items():
        rows, cols = job.matrices[name]
        group = job.group(cols) or cols
        nbytes = affine_bytes(rows, cols, job.bits, group, zero_bits=0 if symmetric else job.bits)
        found[name] = Kept(linear.weight.dequantize().detach().float(), nbytes)
    return found
