"""Trains tiny Llamas on synthetic indirect object identification: a known answer that cheap attributions get wrong.

A prompt is `BOS . A . . B . . S . . . GAVE TO` with fillers at the dots: two names, of which one (S) comes a second
time, and the answer is the other one (after Wang et al. 2022, arXiv 2211.00593, in a language of 63 tokens). Which name
stands first is random, and so is the place of the repetition. The corrupted prompt repeats the other name, so that the
answer flips. Two layers solve it with a head whose effect is several times anything else's, behind a norm and a softmax
that it has saturated: the gradient there is almost zero.

1. AdamW (lr 3e-3, weight decay 0.01, betas 0.9 and 0.98) with warm-up and cosine decay on fresh batches of 128.
2. It stops at an accuracy of 0.998, checked every 250 steps from step 500 on: half a minute on one core.
3. The result is a Hugging Face folder in float16 without a tokenizer.

  python benchmarks/lab/ioi.py --out tests/data/ioi --seeds 0 1 2 3
"""

import argparse
import logging
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuitpress.behaviors import Behavior, Pairs

log = logging.getLogger("ioi")

NAMES, FILLERS = 40, 20
BOS, GAVE, TO = 60, 61, 62
VOCAB, LENGTH = 63, 14
FIRST, SECOND = 2, 5
"""Where the two names are introduced; the repetition is at 8, 9 or 10."""


def prompts(n: int, generator: torch.Generator) -> Pairs:
    """`n` contrast pairs, [n, 14]; the answer is the name that is not repeated."""
    names = torch.rand(n, NAMES, generator=generator).argsort(1)[:, :2]
    other, subject = names.T
    clean = torch.randint(NAMES, NAMES + FILLERS, (n, LENGTH), generator=generator)
    swapped = torch.rand(n, generator=generator) < 0.5
    clean[:, 0], clean[:, -2], clean[:, -1] = BOS, GAVE, TO
    clean[:, FIRST] = torch.where(swapped, subject, other)
    clean[:, SECOND] = torch.where(swapped, other, subject)
    again = torch.randint(8, 11, (n,), generator=generator)
    corrupted = clean.clone()
    clean[torch.arange(n), again] = subject
    corrupted[torch.arange(n), again] = other
    return Pairs(clean, corrupted, torch.full((n,), LENGTH - 1), other.clone(), subject.clone())


def behavior(n: int = 128, seed: int = 10_000) -> Behavior:
    """The task as a behavior, on prompts of a seed that training does not use."""
    pairs = prompts(n, torch.Generator().manual_seed(seed))
    return Behavior("ioi", "logit_diff", pairs, {"source": "benchmarks/lab/ioi.py", "seed": seed})


def make_model(seed: int) -> Any:
    """An untrained Llama: 2 layers, width 64, 4 heads on 2 key-value heads, 128 neurons."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=BOS,
            eos_token_id=None,
        )
    )  # fmt: skip


def train(seed: int, *, steps: int = 1500) -> tuple[Any, float]:
    """A trained model and its accuracy over the whole vocabulary."""
    model, generator = make_model(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, betas=(0.9, 0.98))

    def rate(step: int) -> float:
        return min(1, step / 100) * (0.475 * (1 + math.cos(math.pi * step / steps)) + 0.05)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    reached = 0.0
    for step in range(1, steps + 1):
        batch = prompts(128, generator)
        loss = torch.nn.functional.cross_entropy(model(batch.clean).logits[:, -1], batch.answer)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            reached = accuracy(model, prompts(512, generator))
            log.info("seed %d, step %d: loss %.3f, accuracy %.3f", seed, step, loss.item(), reached)
            if reached > 0.998 and step >= 500:
                break
    return model.eval(), reached


@torch.no_grad()
def accuracy(model: Any, batch: Pairs) -> float:
    """The share of prompts whose likeliest token is the answer."""
    logits: Tensor = model(batch.clean).logits[:, -1]
    return float((logits.argmax(-1) == batch.answer).float().mean())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train tiny Llamas on synthetic IOI.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoints, one seed-N each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    torch.set_num_threads(1)
    for seed in arguments.seeds:
        model, reached = train(seed)
        if reached < 0.99:
            sys.exit(f"error: seed {seed} reached an accuracy of {reached:.3f} only")
        model.half().save_pretrained(arguments.out / f"seed-{seed}")


if __name__ == "__main__":
    main()
