"""What scores of behaviors are compared with: the whole model in float64, its sites hooked by name.

A site is the input of an output projection: `("o", i)` or `("down", i)`. Nothing here uses the library but the types of
behaviors and units.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuitpress.behaviors import Behavior, Pairs
from circuitpress.units import UnitId

from ..whole import blocks_of, load, tokens

Key = tuple[str, int]
Rewrite = Callable[[Tensor], Tensor]
SHAPES = {"tiny_llama": (6, 3, 8), "tiny_gpt2": (5, 5, 8), "tiny_qwen2": (3, 1, 12)}
"""Heads, key-value heads and width of a head."""


def contrasts(n: int = 5, seed: int = 0) -> Behavior:
    """Pairs of 4 to 8 tokens that differ in two of them, padded to 8."""
    clean, other = tokens(n, 8, seed=seed), tokens(n, 8, seed=seed + 50)
    corrupted = clean.clone()
    corrupted[:, 1:3] = other[:, 1:3]
    position = torch.tensor([7, 3, 6, 5, 7])[:n]
    answer, wrong = tokens(2, n, seed=seed + 100)
    return Behavior("pairs", "logit_diff", Pairs(clean, corrupted, position, answer, wrong))


class Whole:
    """A model with its sites, and the logit difference of contrast pairs as its metric."""

    def __init__(self, folder: Path, behavior: Behavior) -> None:
        self.model: Any = load(folder)
        pairs = behavior.pairs
        assert isinstance(pairs, Pairs)
        self.pairs = pairs
        self.blocks = blocks_of(self.model)
        embedding = self.model.get_input_embeddings()
        self.clean, self.base = embedding(pairs.clean).detach(), embedding(pairs.corrupted).detach()
        self.modules: dict[Key, Any] = {}
        for i, block in enumerate(self.blocks):
            llama = hasattr(block, "self_attn")
            self.modules["o", i] = block.self_attn.o_proj if llama else block.attn.c_proj
            self.modules["down", i] = block.mlp.down_proj if llama else block.mlp.c_proj

    def run(self, embeds: Tensor, rewrites: Mapping[Key, Rewrite] | None = None) -> tuple[Tensor, dict[Key, Tensor]]:
        """The metric of every pair, and what entered the sites (after rewriting)."""
        seen: dict[Key, Tensor] = {}

        def hook(key: Key) -> Any:
            def before(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                x = args[0] if rewrites is None or key not in rewrites else rewrites[key](args[0])
                if x.requires_grad and not x.is_leaf:
                    x.retain_grad()
                seen[key] = x
                return (x, *args[1:])

            return before

        handles = [module.register_forward_pre_hook(hook(key)) for key, module in self.modules.items()]
        logits = self.model(inputs_embeds=embeds, use_cache=False).logits
        for handle in handles:
            handle.remove()
        rows, pairs = torch.arange(len(self.pairs)), self.pairs
        at = logits[rows, pairs.position]
        return at[rows, pairs.answer] - at[rows, pairs.wrong], seen

    def sites(self, embeds: Tensor) -> dict[Key, Tensor]:
        """What enters the sites, without gradients."""
        with torch.no_grad():
            return self.run(embeds)[1]

    def gradients(self, embeds: Tensor, rewrites: Mapping[Key, Rewrite] | None = None) -> dict[Key, Tensor]:
        """d(sum of metrics)/d(site)."""
        metric, seen = self.run(embeds.clone().requires_grad_(True), rewrites)
        grads = torch.autograd.grad(metric.sum(), list(seen.values()))
        return dict(zip(seen, grads, strict=True))


def put(columns: slice, value: Tensor) -> Rewrite:
    """Replaces columns of a site."""

    def rewrite(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., columns] = value[..., columns]
        return x

    return rewrite


def span(name: str, unit: UnitId) -> tuple[Key, slice]:
    """The site and the columns of a unit of a tiny model."""
    heads, kv_heads, width = SHAPES[name]
    if unit.kind == "neuron":
        return ("down", unit.layer), slice(unit.index, unit.index + 1)
    width *= heads // kv_heads if unit.kind == "kv_group" else 1
    return ("o", unit.layer), slice(unit.index * width, (unit.index + 1) * width)


def by_unit(name: str, units: tuple[UnitId, ...], columns: Mapping[Key, Tensor]) -> Tensor:
    """Effects [units, n] from effects of columns [n, length, columns] of every site."""
    rows = []
    for unit in units:
        key, where = span(name, unit)
        rows.append(columns[key][..., where].sum((1, 2)))
    return torch.stack(rows)
