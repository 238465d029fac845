"""Teaches a small checkpoint a long context: what a packed cache loses at 8k shows only in a model that looks that far.

1. YaRN (Peng et al. 2023, https://arxiv.org/abs/2309.00071): pairs of channels that turn often within the tokens that
   the checkpoint was trained on keep their speed, those that do not turn once are slowed by the factor of the length,
   and attention is sharpened by its logarithm. `--known` is what it was trained on, which may be less than its
   config.json says: the demo checkpoint saw windows of 256 tokens.
2. Windows are runs of the text from random places; text of long documents, such as books, is what far context helps.
3. AdamW in float32, with warm-up and cosine decay: two windows of `--short` tokens a step first, since a step of 8192
   tokens costs four times as much, then one of the whole length.
4. The loss before and after, by position, on text that training does not see; and that of the same tokens where the
   model sees no more than 1024 tokens. The difference is what far context is worth to it.

The result is a Hugging Face folder; `lengthened.json` in it says what was done, and the losses.

    python benchmarks/lab/lengthen.py recipes/demo/checkpoint --text train.txt --test test.txt --out demo-8k
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from circuitpress.data import SEPARATOR
from circuitpress.files import write_bytes_atomic

EDGES = (0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Where buckets of positions begin."""
NEAR = 512
"""Tokens before a token that a model with short context sees at least; it sees fewer than twice as many."""
TESTED = 4
"""Windows that the loss is measured on."""


@click.command(context_settings={"show_default": True})
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("--text", required=True, type=click.Path(path_type=Path, exists=True), help="Text to train on.")
@click.option(
    "--test", required=True, type=click.Path(path_type=Path, exists=True), help="Text to measure the loss on."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the new checkpoint.")
@click.option("--known", default=256, help="Tokens of the windows that the checkpoint was trained on.")
@click.option("--length", default=8192, help="Tokens that the model is to know.")
@click.option("--short", default=2048, help="Tokens of the windows of the first steps, two a step.")
@click.option("--steps", nargs=2, default=(8, 14), help="Steps with short windows, and with whole ones.")
@click.option("--rate", default=5e-4, help="Peak learning rate.")
@click.option("--seed", default=0)
def main(
    checkpoint: Path, text: Path, test: Path, out: Path, known: int, length: int, short: int, steps: tuple[int, int],
    rate: float, seed: int,
) -> None:  # fmt: skip
    """Fine-tunes CHECKPOINT to --length tokens; six to ten minutes on one core for 5 million weights."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.model_max_length = length
    tested = torch.stack(list(runs(test, tokenizer, [length] * TESTED, seed)))
    config = lengthened(checkpoint, known, length)
    plain: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    record: dict[str, Any] = {
        "of": checkpoint.resolve().name, "from": known, "to": length, "text": text.name, "test": test.name,
        "short": short, "steps": steps, "rate": rate, "seed": seed, "before": by_position(plain, tested),
    }  # fmt: skip
    click.echo(table("before", record["before"]))
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, config=config, dtype=torch.float32)
    lengths = [short] * (2 * steps[0]) + [length] * steps[1]
    tune(model, runs(text, tokenizer, lengths, seed), steps, rate)
    model.to(config.dtype).float()  # what is measured is what is saved
    record["after"] = by_position(model, tested)
    click.echo(table("after", record["after"]))
    model.to(config.dtype).save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_bytes_atomic(out / "lengthened.json", (json.dumps(record, indent=1) + "\n").encode())


def runs(path: Path, tokenizer: PreTrainedTokenizerBase, lengths: list[int], seed: int) -> Iterator[Tensor]:
    """Ids [length] of one run of the text for each length, each from the beginning of a random line."""
    text = path.read_text().replace(f"{SEPARATOR}\n", str(tokenizer.eos_token or "\n"))
    draw = np.random.default_rng(seed)
    for length in lengths:
        ids: list[int] = []
        for _ in range(1000):
            at = text.find("\n", int(draw.integers(len(text)))) + 1
            ids = tokenizer(text[at : at + 8 * length], verbose=False).input_ids[:length]
            if at and len(ids) == length:
                break
        else:
            raise click.ClickException(f"{path} has no run of {length} tokens: give a longer text")
        yield torch.tensor(ids)


def lengthened(checkpoint: Path, known: int, length: int) -> Any:
    """The configuration for `length` tokens of a checkpoint that was trained on `known`."""
    config: Any = AutoConfig.from_pretrained(checkpoint)
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise click.ClickException(f"{checkpoint} has a rotation that is scaled already ({rope['rope_type']})")
    scaled = {"rope_type": "yarn", "factor": length / known, "original_max_position_embeddings": known}
    config.rope_parameters, config.max_position_embeddings = {**rope, **scaled}, length
    return config


def tune(model: nn.Module, windows: Iterator[Tensor], steps: tuple[int, int], rate: float) -> None:
    """AdamW: two windows a step at first, one in the second part."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    total = sum(steps)
    model.train()
    for step in range(total):
        ids = torch.stack([next(windows) for _ in range(2 if step < steps[0] else 1)])
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 4) * (0.525 + 0.475 * math.cos(math.pi * step / total))
        loss = token_losses(model, ids).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 2 == 0:
            click.echo(f"step {step + 1} of {total}, {ids.shape[1]} tokens: loss {loss.item():.3f}")
    model.eval()


def token_losses(model: Any, ids: Tensor) -> Tensor:
    """-log p of every token but the first, [windows, length - 1], in nats."""
    logits = model(ids, use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


@torch.no_grad()
def by_position(model: Any, windows: Tensor) -> dict[str, dict[str, float]]:
    """Mean loss of `windows` [n, length] by position, of tokens behind the whole window and behind its nearest ones."""
    found = {
        "whole": torch.cat([token_losses(model, ids[None]) for ids in windows]),
        "nearest": torch.cat([near_losses(model, ids) for ids in windows]),
    }
    places = torch.arange(1, windows.shape[1])
    return {
        name: {
            f"{low}-{high}": float(losses[:, (places >= low) & (places < high)].double().mean())
            for low, high in zip(EDGES, EDGES[1:], strict=False)
            if low < windows.shape[1]
        }
        for name, losses in found.items()
    }


def near_losses(model: Any, ids: Tensor) -> Tensor:
    """Losses [1, length - 1] of a window where a token sees those of its own half of a piece and the half before."""
    parts, first = [], 0
    while first + 1 < len(ids):
        start = max(0, first - NEAR)
        losses = token_losses(model, ids[None, start : first + NEAR + 1])
        parts.append(losses[:, first - start :])
        first += NEAR
    return torch.cat(parts, 1)


def table(name: str, found: dict[str, dict[str, float]]) -> str:
    """The losses in lines."""
    lines = [f"{name}, nats a token by position"]
    for kind, losses in found.items():
        lines.append(f"  {kind:8}" + "  ".join(f"{bucket}: {value:.3f}" for bucket, value in losses.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
