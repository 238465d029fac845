# pyright: reportMissingImports=false
"""Block formats of llama.cpp as the gguf package quantizes them: Q4_0, Q4_1 and others (blocks of 32, float16 scales).

https://github.com/ggml-org/llama.cpp/tree/master/gguf-py. The package only decodes the K-quants (Q2_K to Q6_K) and most
IQ types, and knows no importance: llamacpp.py has both. Inputs that are no multiple of 32 stay at 16 bits, as there.
"""

from collections.abc import Mapping

import torch

from .protocol import Job, Kept


def quantize(job: Job) -> Mapping[str, Kept]:
    """`options`: type, a name of gguf.GGMLQuantizationType such as `Q4_0`."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    form = GGMLQuantizationType[job.options["type"]]
    block, _ = GGML_QUANT_SIZES[form]
    found = {}
    for name, linear in job.linears(job.load()).items():
        if job.matrices[name][1] % block:
            job.notes.append(f"{name} left at 16 bits")
            continue
        with job.timed():
            data = quants.quantize(linear.weight.detach().float().numpy(), form)
        found[name] = Kept(torch.from_numpy(quants.dequantize(data, form).copy()), data.nbytes)
    return found
