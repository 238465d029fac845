"""Attention patterns, and the scores by which heads are named.

The model runs with a fused kernel that keeps no weights. `weights` therefore runs the block once more through
transformers' own eager attention (the mask, scaling, rotary tables and norms on q and k are those of the model), and
compares its output with the fused one: a pattern that does not belong to the output is an error, not a picture.

`head_scores` are means over sequences of random distinct tokens, a segment of s repeated (Olsson et al., 2022,
"In-context Learning and Induction Heads"), where only the pattern's kind can be the reason:

    previous_token  attention t -> t-1
    induction       t in the second segment -> t-s+1, the token after the earlier occurrence (prefix matching)
    duplicate       t in the second segment -> t-s, the earlier occurrence
    first_position  t -> 0, the attention sink

Attention weights are correlational: a head can have the induction pattern and move nothing that is used. Only an
ablation says whether it matters.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ...console import Advance, ignore
from ...errors import CheckpointError
from ...stream import Stream
from ..sites import walk


@dataclass(frozen=True)
class HeadScores:
    """Scores of one head, each a mean attention weight between 0 and 1."""

    layer: int
    head: int
    previous_token: float
    induction: float
    duplicate: float
    first_position: float


@torch.no_grad()
def weights(stream: Stream, index: int, module: nn.Module, hidden: Tensor) -> Tensor:
    """Attention weights [batch, heads, length, length] (query, key) of resident block `index` on `hidden`.

    CheckpointError if eager attention does not give the block's own output.
    """
    block = stream.anatomy.blocks[index]
    attention = module.get_submodule(block.local(block.role("o")).rpartition(".")[0])
    expected = stream.run(index, module, hidden)
    seen: list[Any] = []
    handle = attention.register_forward_hook(lambda _, __, output: seen.append(output[1]))
    try:
        with _eager(stream, attention, hidden.shape[:2]):
            output = stream.run(index, module, hidden)
    finally:
        handle.remove()
    found = seen[-1] if seen else None
    shape = (hidden.shape[0], block.heads, hidden.shape[1], hidden.shape[1])
    if not isinstance(found, Tensor) or found.shape != shape:
        _fail(block.prefix, "transformers returned no attention weights")
    # Another order of summation, and in 16 bits another rounding of the weights themselves.
    room = 64 * torch.finfo(hidden.dtype).eps * float(expected.abs().max())
    if not torch.allclose(output, expected, rtol=0, atol=room):
        _fail(block.prefix, "eager attention gives another output than the model's own")
    return found.float()


@contextlib.contextmanager
def _eager(stream: Stream, attention: nn.Module, shape: torch.Size) -> Iterator[None]:
    """Switches the model to eager attention; masks depend on it, so the block's arguments are recorded anew."""
    config: Any = attention.config
    before, ids = config._attn_implementation, torch.zeros(shape, dtype=torch.long)
    try:
        config._attn_implementation = "eager"
        stream.embed(ids)
        yield
    finally:
        config._attn_implementation = before
        stream.embed(ids)


def _fail(block: str, cause: str) -> NoReturn:
    hint = "patterns of this model would be wrong: report the architecture and the transformers version"
    raise CheckpointError(f"attention of {block}: {cause}", hint=hint)


def patterns(stream: Stream, windows: Tensor, *, advance: Advance = ignore) -> Tensor:
    """The attention weights [layers, heads, length, length] of all heads, the mean over windows int64 [n, length]."""
    total: dict[int, Tensor] = {}

    def visit(index: int, module: nn.Module, _: int, hidden: Tensor) -> Tensor:
        found = weights(stream, index, module, hidden).sum(0).cpu()
        total[index] = total[index] + found if index in total else found
        return stream.run(index, module, hidden)

    walk(stream, stream.batches(windows), visit, advance=advance).clear()
    return torch.stack([total[index] for index in range(stream.depth)]) / len(windows)


def repeated(
    vocab: int, *, segment: int, samples: int, seed: int = 0, first: int | None = None, avoid: tuple[int, ...] = ()
) -> Tensor:
    """Random distinct tokens twice in a row, int64 [samples, 2 * segment], after `first` (a BOS token) if there is one.

    `avoid` are ids that no text contains. ValueError if fewer than `segment` ids are left.
    """
    usable = torch.tensor([token for token in range(vocab) if token not in {*avoid, first}])
    if len(usable) < segment:
        raise ValueError(f"{len(usable)} usable tokens are too few for segments of {segment}")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.stack([usable[torch.randperm(len(usable), generator=generator)[:segment]] for _ in range(samples)])
    rows = torch.cat([rows, rows], 1)
    return rows if first is None else torch.cat([torch.full((samples, 1), first), rows], 1)


def head_scores(stream: Stream, ids: Tensor, segment: int, *, advance: Advance = ignore) -> list[HeadScores]:
    """The scores of all heads on `repeated` tokens int64 [n, (1 +) 2 * segment]."""
    mean = patterns(stream, ids, advance=advance)
    return [
        HeadScores(layer, head, **score_pattern(mean[layer, head], segment))
        for layer in range(mean.shape[0])
        for head in range(mean.shape[1])
    ]


def score_pattern(pattern: Tensor, segment: int) -> dict[str, float]:
    """The scores of one mean pattern [length, length] of sequences that end with a segment and its repetition."""
    length = pattern.shape[0]
    second = torch.arange(length - segment, length)
    later = torch.arange(1, length)
    return {
        "previous_token": float(pattern[later, later - 1].mean()),
        "induction": float(pattern[second, second - segment + 1].mean()),
        "duplicate": float(pattern[second, second - segment].mean()),
        "first_position": float(pattern[later, 0].mean()),
    }
