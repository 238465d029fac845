# pyright: reportMissingImports=false
"""llm-compressor (vLLM): GPTQ with static activation ordering, compressed-tensors' pack-quantized layout.

https://github.com/vllm-project/llm-compressor. Stored are packed codes, 16-bit scales and, if asymmetric, packed zero
points; the weights are rebuilt from codes and float16 scales.
"""

from collections.abc import Mapping

import torch

from .protocol import Job, Kept, affine, affine_bytes


def quantize(job: Job) -> Mapping[str, Kept]:
    """`options`: sym (False). Inputs that no group divides get one scale a row, which is all that the layout knows."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    symmetric = job.options.get("sym", False)
    by_group: dict[int, list[str]] = {}
    for name, (_, cols) in job.matrices.items():
        by_group.setdefault(job.group(cols), []).append(name)
    groups = {}
    for group, names in by_group.items():
        shape = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
        weights = {"num_bits": job.bits, "type": "int", "symmetric": symmetric, **shape}
        groups[f"group_{group}"] = {"targets": names, "weights": weights}
    model = job.load()
    ids = job.tokens()
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    with job.timed():
        oneshot(
            model=model,
            dataset=rows,
            recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"]),
            max_seq_length=ids.shape[1],
            num_calibration_samples=len(ids),
            shuffle_calibration_samples=False,
            tokenizer=job.tokenizer(),
        )
    found = {}
    for name, linear in job.linears(model).items():
        found[name] = _kept(linear, job, *job.matrices[name], symmetric=symmetric)
    return found


def _kept(linear: torch.nn.Module, job: Job, rows: int, cols: int, *, symmetric: bool) -> Kept:
    weight = linear.get_parameter("weight").detach().float()
    scale = torch.as_tensor(linear.weight_scale).detach().float().reshape(rows, -1)
    zero = getattr(linear, "weight_zero_point", None)
    zero = 0.0 if zero is None or symmetric else torch.as_tensor(zero).detach().float().reshape(rows, -1)
    group = cols // scale.shape[1]
    spread = scale.repeat_interleave(group, 1)
    offset = zero.repeat_interleave(group, 1) if isinstance(zero, torch.Tensor) else zero
    codes = (weight / spread.where(spread != 0, torch.ones(()))).add(offset).round()
    rebuilt = affine(codes.clamp(-(2 ** (job.bits - 1)), 2 ** (job.bits - 1) - 1), scale.half(), zero, group)
    drift = float((rebuilt - weight).norm() / weight.norm())
    if drift > 0.02:
        raise ValueError(f"weights of llm-compressor are not (code - zero) x scale: relative distance {drift:.3f}")
    return Kept(rebuilt, affine_bytes(rows, cols, job.bits, group, zero_bits=0 if symmetric else job.bits))
