# pyright: reportMissingImports=false
"""AutoRound (Intel): signed gradient descent on rounding and clipping, block by block.

Cheng et al. 2023, https://arxiv.org/abs/2309.05516. It tunes in bfloat16 on a CPU. Its scales are stored as float16 and
its zero points with the codes' bits (the GPTQ file layout), so the weights are rebuilt as (code - zero) x scale.
A matrix with a side that is no multiple of 32 is left at 16 bits whatever one asks for.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .protocol import Job, Kept, affine, affine_bytes


def quantize(job: Job) -> Mapping[str, Kept]:
    """`options`: iters (200), sym (False), batch_size (8)."""
    from auto_round import AutoRound

    ids = job.tokens()
    model = job.load()
    batch = job.options.get("batch_size", 8)
    own = {name: job.group(cols) for name, (_, cols) in job.matrices.items()}
    common = {"bits": job.bits, "sym": job.options.get("sym", False), "data_type": "int"}
    layers = {name: common | {"group_size": size} for name, size in own.items() if size not in (0, job.group_size)}
    rounding = AutoRound(
        model,
        job.tokenizer(),
        **common,
        group_size=job.group_size,
        layer_config=layers,
        iters=job.options.get("iters", 200),
        nsamples=len(ids),
        seqlen=ids.shape[1],
        batch_size=batch,
        dataset=torch.utils.data.DataLoader(ids, batch_size=batch),  # pyright: ignore[reportArgumentType]
        device_map="cpu",
        enable_torch_compile=False,
        **job.options.get("extra", {}),
    )
    with job.timed():
        model, _ = rounding.quantize()
    found = {}
    for name, linear in job.linears(model).items():
        scale = getattr(linear, "scale", None)
        if scale is None:
            job.notes.append(f"{name} left at 16 bits")
            continue
        found[name] = _kept(linear, job, *job.matrices[name])
    return found


def _kept(linear: Any, job: Job, rows: int, cols: int) -> Kept:
    weight = linear.weight.detach().float()
    scale = torch.as_tensor(linear.scale).detach().reshape(rows, -1)
    group = -(-cols // scale.shape[1])
    zero = linear.zp.detach().reshape(rows, -1).float() if isinstance(linear.zp, Tensor) else float(linear.zp)
    stored = scale.half().float()
    spread = scale.float().repeat_interleave(group, 1)[:, :cols]
    offset = zero.repeat_interleave(group, 1)[:, :cols] if isinstance(zero, Tensor) else zero
    # An all-zero group may have a scale of zero.
    codes = (weight / spread.where(spread != 0, torch.ones(()))).add(offset).round().clamp(0, 2**job.bits - 1)
    rebuilt = affine(codes, stored, zero, group)
    drift = float((rebuilt - weight).norm() / weight.norm())
    if drift > 0.02:
        raise ValueError(f"weights of AutoRound are not (code - zero) x scale: relative distance {drift:.3f}")
    return Kept(rebuilt, affine_bytes(rows, cols, job.bits, group, zero_bits=job.bits))
