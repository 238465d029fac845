# pyright: reportMissingImports=false
"""optimum's GPTQQuantizer, the GPTQ behind transformers' GPTQConfig (https://huggingface.co/docs/optimum).

It knows one group size for the whole model: the largest allowed one that divides the inputs of every matrix.
"""

from collections.abc import Mapping

import torch

from .packing import decode, refuse_another_map
from .protocol import Job, Kept

_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def quantize(job: Job) -> Mapping[str, Kept]:
    """`options`: sym (False), desc_act (False), damp_percent (0.1, the package's default)."""
    from optimum.gptq import GPTQQuantizer

    group = min(job.group(cols) for _, cols in job.matrices.values())
    if group == 0:
        raise ValueError("no group size divides the inputs of every matrix")
    if group != job.group_size:
        job.notes.append(f"groups of {group}")
    desc_act = job.options.get("desc_act", False)
    quantizer = GPTQQuantizer(
        bits=job.bits,
        dataset=[{"input_ids": [ids.tolist()], "attention_mask": [[1] * len(ids)]} for ids in job.tokens()],
        group_size=group,
        sym=job.options.get("sym", False),
        desc_act=desc_act,
        act_group_aware=not desc_act,
        damp_percent=job.options.get("damp_percent", 0.1),
        model_seqlen=job.tokens().shape[1],
    )
    model = job.load()
    with job.timed():
        model = quantizer.quantize_model(model, job.tokenizer())
    found = {}
    for name, linear in job.linears(model).items():
        parts = {part: torch.as_tensor(getattr(linear, part)).detach() for part in _PARTS if hasattr(linear, part)}
        if len(parts) < len(_PARTS):
            job.notes.append(f"{name} left at 16 bits")
            continue
        # After packing, optimum converts the layers to version 2, whose zero points are as they are; `qzero_format`
        # of the layers goes on saying 1.
        found[name] = decode(parts, job.bits, minus_one=False, reordered=desc_act)
        refuse_another_map(name, linear, found[name])
    return found
