"""Patching of edges by brute force on the whole model: every receiver's input is summed sender by sender.

Nothing here uses the library. Norms, linear maps and MLPs are transformers' own modules, attention is written out; one
dictionary holds what every sender wrote, and each receiver adds up what its edges carry.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Parts = dict[str, Tensor]
"""Sender -> what it wrote into the residual stream [n, t, hidden]."""


def embed(model: Any, ids: Tensor) -> Tensor:
    """The state that enters block 0."""
    if hasattr(model, "model"):
        return model.model.embed_tokens(ids)
    body = model.transformer
    return body.wte(ids) + body.wpe(torch.arange(ids.shape[1]))


def run(
    model: Any, start: Tensor, *, patched: set[tuple[str, str]] = frozenset(), other: Parts | None = None,  # pyright: ignore
    nudge: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Parts]:  # fmt: skip
    """The final hidden states of a run from `start` [n, t, hidden], and the parts of all senders.

    Edges in `patched` carry the parts of `other`. `nudge` adds a tensor to what a receiver reads.
    """
    parts: Parts = {"embed": start}
    biases = torch.zeros_like(start)

    def read(receiver: str) -> Tensor:
        total = biases
        for sender, part in parts.items():
            total = total + (other[sender] if (sender, receiver) in patched else part)  # pyright: ignore
        return total + (nudge or {}).get(receiver, torch.zeros(()))

    for i, block in enumerate(model.model.layers if hasattr(model, "model") else model.transformer.h):
        written, bias = _attention(model, block, i, read)
        biases = biases + bias
        parts |= written
        norm, mlp = (block.post_attention_layernorm, block.mlp) if hasattr(model, "model") else (block.ln_2, block.mlp)
        parts[f"L{i}.mlp"] = mlp(norm(read(f"L{i}.mlp")))
    return read("logits"), parts


def logits(model: Any, final: Tensor) -> Tensor:
    """The logits of final hidden states."""
    norm = model.model.norm if hasattr(model, "model") else model.transformer.ln_f
    return model.lm_head(norm(final))


def _attention(model: Any, block: Any, i: int, read: Any) -> tuple[Parts, Tensor]:
    """What each head of block i writes, and the bias of the output projection."""
    llama = hasattr(model, "model")
    config = model.config
    heads = config.num_attention_heads
    groups = config.num_key_value_heads if llama else heads
    norm = block.input_layernorm if llama else block.ln_1
    own = block.self_attn if llama else block.attn
    projected: dict[tuple[str, int], Tensor] = {}
    for part, count in (("q", heads), ("k", groups), ("v", groups)):
        for h in range(count):
            name = f"L{i}.head.{h}.q" if part == "q" else f"L{i}.kv_group.{h}.{part}"
            x = norm(read(name))
            if llama:
                y = getattr(own, f"{part}_proj")(x)
                size = y.shape[-1] // count
                y = y[..., h * size : (h + 1) * size]
                scale = getattr(own, f"{part}_norm", None)
                y = y if scale is None else scale(y)
                projected[part, h] = _rotate(model, y) if part in "qk" else y
            else:
                size = config.n_embd // heads
                at = "qkv".index(part) * config.n_embd + h * size
                projected[part, h] = own.c_attn(x)[..., at : at + size]
    output = own.o_proj.weight.T if llama else own.c_proj.weight
    result, length = {}, projected["q", 0].shape[1]
    for h in range(heads):
        q, k, v = projected["q", h], *(projected[part, h // (heads // groups)] for part in "kv")
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        z = scores.masked_fill(~mask, -math.inf).softmax(-1) @ v
        result[f"L{i}.head.{h}"] = z @ output[h * z.shape[-1] : (h + 1) * z.shape[-1]]
    return result, torch.zeros(()) if llama else own.c_proj.bias


def _rotate(model: Any, x: Tensor) -> Tensor:
    cos, sin = model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
