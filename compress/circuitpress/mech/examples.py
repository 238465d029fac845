"""Maximally activating text: the windows in which a feature, a neuron or a head is largest, beside random ones.

1. The site is collected once, block by block; a reader turns its activations into one value a token for each part:
   an SAE feature's activation, a neuron's activation, the norm of what a head writes into the residual stream.
2. Of every window the peak is kept; the windows with the highest peaks are shown around that position, each token with
   its value.
3. `control` are windows drawn at random among all, around a random position. What the top windows share and the
   control does not is a hypothesis about the part; what both share is a property of the text.

Evidence: correlational. Top examples show the extreme end of a part's range, and say nothing of what the model does
with it.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..console import Advance, ignore
from ..hooks import unit_columns, weight_of
from ..stream import Stream
from ..units import UnitId
from .sites import Site, read, walk

Reader = Callable[[Tensor], Tensor]
"""Activations [batch, length, width] of a site to one value for each part [batch, length, parts]."""


@dataclass(frozen=True)
class Excerpt:
    """A run of a window: its token `ids`, the part's `values` at them, and where in the run its `peak` is."""

    window: int
    start: int
    peak: int
    value: float
    ids: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Examples:
    """One part: excerpts with the largest values, random ones, and how the part behaves over all tokens.

    `firing_rate` is the share of tokens whose value is not zero, `mean` the mean of its magnitude.
    """

    part: str
    top: tuple[Excerpt, ...]
    control: tuple[Excerpt, ...]
    firing_rate: float
    mean: float

    def to_json(self, decode: Callable[[int], str]) -> dict[str, Any]:
        """With the text of every token beside its id."""
        document: dict[str, Any] = asdict(self) | {"evidence": "correlational"}
        for name in ("top", "control"):
            for row in document[name]:
                row["tokens"] = [decode(token) for token in row["ids"]]
        return document


def activating(
    stream: Stream,
    windows: Tensor,
    site: Site,
    parts: Sequence[str],
    reader: Callable[[nn.Module], Reader],
    *,
    count: int = 5,
    before: int = 12,
    after: int = 6,
    seed: int = 0,
    skip: int = 0,
    advance: Advance = ignore,
) -> list[Examples]:
    """Examples for each of `parts` on windows int64 [n, length]; `reader(block)` gives the reader of the site.

    Values are ranked by magnitude (a neuron's may be negative); the first `skip` positions of a window do not count.
    """
    values = values_of(stream, windows, site, reader, skip=skip, advance=advance)
    generator = torch.Generator().manual_seed(seed)
    n, length = windows.shape
    result = []
    for p, part in enumerate(parts):
        own = values[..., p]
        height, at = own.abs().max(1)
        order = height.argsort(descending=True, stable=True)[:count].tolist()
        top = [excerpt(windows, own, w, int(at[w]), before, after) for w in order if height[w] > 0]
        drawn = torch.randint(n, (count,), generator=generator).tolist()
        spots = torch.randint(skip, length, (count,), generator=generator).tolist()
        control = [excerpt(windows, own, w, t, before, after) for w, t in zip(drawn, spots, strict=True)]
        counted = own[:, skip:]
        rate, mean = float((counted != 0).double().mean()), float(counted.abs().double().mean())
        result.append(Examples(part, tuple(top), tuple(control), rate, mean))
    return result


def values_of(
    stream: Stream, windows: Tensor, site: Site, reader: Callable[[nn.Module], Reader], *, skip: int = 0,
    advance: Advance = ignore,
) -> Tensor:  # fmt: skip
    """What the reader says of every token, float32 [n, length, parts]; zero at the first `skip` positions."""
    site.width(stream.anatomy)
    batches, found = stream.batches(windows), []

    def visit(index: int, module: nn.Module, _: int, hidden: Tensor) -> Tensor:
        if index != site.layer:
            return stream.run(index, module, hidden)
        seen, output = read(stream, index, module, hidden, [site.name])
        value = reader(module)(seen[site.name]).float().cpu()
        value[:, :skip] = 0
        found.append(value)
        return output

    walk(stream, batches, visit, depth=site.layer + 1, advance=advance).clear()
    return torch.cat(found)


def excerpt(windows: Tensor, values: Tensor, window: int, position: int, before: int, after: int) -> Excerpt:
    """The tokens around `position` of a window; `values` [n, length] are those of one part."""
    start = max(0, position - before)
    span = slice(start, position + after + 1)
    ids, own = windows[window, span].tolist(), values[window, span].tolist()
    return Excerpt(window, start, position - start, float(values[window, position]), tuple(ids), tuple(own))


def of_units(
    stream: Stream, windows: Tensor, units: Sequence[UnitId], *, count: int = 5, seed: int = 0,
    advance: Advance = ignore,
) -> list[Examples]:  # fmt: skip
    """Examples of heads and neurons (one walk for each layer and kind); ValueError for other kinds."""
    found: dict[UnitId, Examples] = {}
    for layer, kind in sorted({(unit.layer, unit.kind) for unit in units}):
        if kind not in ("head", "neuron"):
            raise ValueError(f"a {kind} has no value of its own at a token: ask for heads or neurons")
        own = [unit for unit in units if (unit.layer, unit.kind) == (layer, kind)]
        site = Site(layer, "head_out" if kind == "head" else "neurons")
        site.width(stream.anatomy)
        place = stream.anatomy.blocks[layer]
        columns = [unit_columns(place, kind, unit.index)[1] for unit in own]

        def reader(module: nn.Module, kind: str = kind, place: Any = place, columns: list[slice] = columns) -> Reader:
            if kind == "neuron":
                return lambda x: torch.cat([x[..., span] for span in columns], -1)
            weight = weight_of(module, place, place.role("o"))
            return lambda x: torch.stack([(x[..., span] @ weight[:, span].T).norm(dim=-1) for span in columns], -1)

        rows = activating(
            stream, windows, site, [str(unit) for unit in own], reader, count=count, seed=seed, skip=1, advance=advance
        )
        found |= dict(zip(own, rows, strict=True))
    return [found[unit] for unit in units]
