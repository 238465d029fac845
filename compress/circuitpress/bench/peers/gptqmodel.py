# pyright: reportMissingImports=false
"""GPTQModel: GPTQ with group-aware ordering, in the GPTQ file layout (https://github.com/ModelCloud/GPTQModel).

Frantar et al. 2022, https://arxiv.org/abs/2210.17323; with `gptaq` the variant that corrects for the quantized prefix
(https://arxiv.org/abs/2504.02692). What is judged is read back from the files that it saves.
"""

import json
import re
from collections.abc import Mapping

import torch
from safetensors.torch import load_file

from .packing import decode
from .protocol import Job, Kept, scratch


def quantize(job: Job) -> Mapping[str, Kept]:
    """`options`: sym (False), desc_act (False), gptaq (False)."""
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import GPTAQConfig

    own = {name: job.group(cols) for name, (_, cols) in job.matrices.items()}
    dynamic = {
        rf"+:^{re.escape(name)}$": {"group_size": size} for name, size in own.items() if size not in (0, job.group_size)
    }
    desc_act = job.options.get("desc_act", False)
    config = QuantizeConfig(
        bits=job.bits,
        group_size=job.group_size,
        sym=job.options.get("sym", False),
        desc_act=desc_act,
        act_group_aware=not desc_act,
        dynamic=dynamic or None,
        gptaq=GPTAQConfig() if job.options.get("gptaq") else None,
        offload_to_disk=False,  # with tied embeddings its default fails: Tensor.item() on meta tensors
    )
    model = GPTQModel.load(job.checkpoint, config, device="cpu", dtype=torch.float32)
    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in job.tokens()]
    with job.timed():
        model.quantize(rows, tokenizer=job.tokenizer(), batch_size=1, calibration_sort=None)
    out = scratch(job, "model")
    model.save(str(out))
    return _read(job, out)


def _read(job: Job, out: object) -> Mapping[str, Kept]:
    from pathlib import Path

    folder = Path(str(out))
    config = json.loads((folder / "quantize_config.json").read_text())
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    found = {}
    for name in job.matrices:
        mine = {part: tensors[f"{name}.{part}"] for part in _PARTS if f"{name}.{part}" in tensors}
        if len(mine) < len(_PARTS):
            job.notes.append(f"{name} left at 16 bits")
            continue
        form = config.get("format", config.get("checkpoint_format", "gptq"))
        found[name] = decode(mine, job.bits, minus_one=form == "gptq", reordered=bool(config.get("desc_act")))
    return found


_PARTS = ("qweight", "qzeros", "scales", "g_idx")
