"""Text that a model writes itself, for learning from when there is little calibration text.

Each window begins with the first tokens of a calibration window and goes on with samples from the model's own softmax
(temperature 1, nothing cut off). On such text the model's predictions are at home, and there is no end of it: LLM-QAT
(Liu et al. 2023, arXiv 2305.17888) trains on nothing else.
"""

from pathlib import Path

import torch
from torch import Tensor

from ..console import Advance, ignore

PROMPT = 8
"""Tokens taken from a calibration window."""


def continuations(
    folder: Path, windows: Tensor, *, count: int, seed: int = 0, device: torch.device | str = "cpu", batch: int = 64,
    advance: Advance = ignore,
) -> Tensor:  # fmt: skip
    """`count` windows int64 [count, length] that begin like the rows of `windows` [n, length], in turn."""
    import transformers

    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder)  # pyright: ignore
    model.to(device).eval()  # pyright: ignore
    length = windows.shape[1]
    rows = torch.arange(count) % len(windows)
    result = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for part in rows.split(batch):
            prompt = windows[part, : min(PROMPT, length - 1)].to(device)
            result.append(_continue(model, prompt, length).cpu())
            advance(len(part) / count, f"{sum(map(len, result))} windows written")
    return torch.cat(result)


@torch.no_grad()
def _continue(model: torch.nn.Module, prompt: Tensor, length: int) -> Tensor:
    """Samples token by token; `generate` would stop rows at an end-of-text token and pad them."""
    ids, cache, new = prompt, None, prompt
    while ids.shape[1] < length:
        output = model(new, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        new = output.logits[:, -1].float().softmax(-1).multinomial(1)
        ids = torch.cat([ids, new], 1)
    return ids
