"""Walks a behavior's prompts up and down a streamed model, from any input states, several runs at a time.

A *run* is the prompts with particular input states: `clean`, `base` (the corrupted prompts) or a point between the two.
All runs pass a block while it is resident, so the weights are read once up and once down whatever the number of runs.
What is kept are hidden states between blocks (in a `Store`, which can spill); activations of heads and neurons are
recomputed from them while their block is resident and let go with it.

1. `clean_inputs` and `base_inputs` are the states that enter block 0. Contrast pairs have their corrupted prompts as
   base; texts their own tokens in another order; for minimal pairs of sentences, which need not align, it is the mean
   input at every position.
2. `ascend` carries runs up and keeps the input of every block under (run, block, batch).
3. `pull_sites` recomputes one block and turns the gradient at its output into gradients at its input and at the two
   *sites* through which units enter the residual stream: the input of `o` (heads) and that of `down` (neurons).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..anatomy import Block
from ..behaviors import Behavior, Pairs
from ..console import Advance, ignore
from ..errors import CheckpointError
from ..hooks import capture
from ..store import Store
from ..stream import Stream
from .metrics import answer_logits, mask_of, rows_of

Site = Literal["o", "down"]
SITES: tuple[Site, Site] = ("o", "down")
Inputs = Callable[[str, int], Tensor]
"""`inputs(run, b)`: what enters the resident block in that run, for micro-batch b."""
Change = Literal["resample", "zero", "mean"]
"""What replaces an activation: its value in the base run, zero, or its mean over the prompts at the same position."""
Visit = Callable[[int, nn.Module, Inputs], None]


def clean_inputs(stream: Stream, behavior: Behavior) -> list[Tensor]:
    """The input of block 0 for every micro-batch of the behavior's rows: [batch, length, hidden] each."""
    return [stream.embed(ids) for ids in stream.batches(rows_of(behavior))]


def base_inputs(stream: Stream, behavior: Behavior) -> list[Tensor]:
    """The input of block 0 that stands for "the behavior's cause is absent", in the shapes of `clean_inputs`."""
    pairs = behavior.pairs
    if isinstance(pairs, Pairs):
        return [stream.embed(ids) for ids in stream.batches(pairs.corrupted)]
    if behavior.metric == "loss":
        return [stream.embed(ids) for ids in stream.batches(pairs.bad)]
    clean = clean_inputs(stream, behavior)
    mean = mean_by_position(clean, mask_of(behavior))
    return [mean.expand_as(hidden) for hidden in clean]


def mean_by_position(batches: Sequence[Tensor], mask: Tensor) -> Tensor:
    """The mean [length, width] over all rows of [batch, length, width] at which `mask` [rows, length] is set."""
    total, row = torch.zeros_like(batches[0][0], dtype=torch.float32), 0
    mask = mask.to(total.device)
    for x in batches:
        total += (x * mask[row : row + len(x), :, None]).float().sum(0)
        row += len(x)
    return (total / mask.sum(0)[:, None].clamp(min=1)).to(batches[0].dtype)


def between(base: Sequence[Tensor], clean: Sequence[Tensor], share: float) -> list[Tensor]:
    """base + share (clean - base), batch by batch."""
    return [torch.lerp(b, c, share) for b, c in zip(base, clean, strict=True)]


@torch.no_grad()
def ascend(
    stream: Stream, starts: Mapping[str, Sequence[Tensor]], store: Store, *, keep: bool = True, first: int = 0,
    visit: Visit | None = None, advance: Advance = ignore,
) -> None:  # fmt: skip
    """Carries runs from the input of block `first` to the top; the final states are under (run, depth, batch).

    With `keep` the input of every block stays in `store`, for a walk down.
    """
    counts = {run: len(states) for run, states in starts.items()}
    for run, states in starts.items():
        for b, hidden in enumerate(states):
            store.put((run, first, b), hidden)
    for i in range(first, stream.depth):
        with stream.block(i) as module:
            if visit is not None:
                visit(i, module, lambda run, b, i=i: store.get((run, i, b), stream.device))
            for run, count in counts.items():
                for b in range(count):
                    hidden = stream.run(i, module, store.get((run, i, b), stream.device))
                    check_finite(stream, i, hidden)
                    store.put((run, i + 1, b), hidden)
                    if not keep:
                        store.drop((run, i, b))
        advance(1, f"block {i}")


Pull = Callable[[str, int], dict[Site, Tensor]]
"""`pull(run, b)` takes the gradient of that run and micro-batch down through the resident block, and returns the
gradients at its sites. It must be called once for every run and micro-batch."""


def descend(
    stream: Stream, store: Store, gradients: Mapping[str, list[Tensor]],
    visit: Callable[[int, nn.Module, Inputs, Pull], None], *, last: int = 0, advance: Advance = ignore,
) -> None:  # fmt: skip
    """Walks down to block `last`; `gradients[run][b]` start at the final states and end at the input of that block.

    `store` holds what `ascend` kept of these runs, `clean` and `base`, and is emptied on the way. ValueError if `visit`
    leaves out a pull.
    """
    for i in reversed(range(last, stream.depth)):
        place, pulled = stream.anatomy.blocks[i], set()
        with stream.block(i) as module:

            def inputs(run: str, b: int, i: int = i) -> Tensor:
                return store.get((run, i, b), stream.device)

            def pull(
                run: str, b: int, module: nn.Module = module, place: Block = place, pulled: set[Any] = pulled
            ) -> dict[Site, Tensor]:
                hidden = store.get((run, place.index, b), stream.device)
                gradients[run][b], sites = pull_sites(stream, module, place, hidden, gradients[run][b])
                pulled.add((run, b))
                return sites

            visit(i, module, inputs, pull)
        if len(pulled) < sum(map(len, gradients.values())):
            raise ValueError(f"block {i}: only {len(pulled)} gradients were pulled")
        for run in {"clean", "base", *gradients}:
            for b in range(max(map(len, gradients.values()))):
                store.drop((run, i + 1, b))
        advance(1, f"block {i}, gradients")


def final_states(stream: Stream, store: Store, run: str) -> list[Tensor]:
    """The states of a run above the last block, batch by batch."""
    states = []
    while (key := (run, stream.depth, len(states))) in store:
        states.append(store.get(key, stream.device))
    return states


def own_reference(stream: Stream, behavior: Behavior, final: Sequence[Tensor]) -> Tensor | None:
    """What metric kl compares with inside one model: the answer logits of its clean run. None for other metrics."""
    return answer_logits(stream, behavior, final) if behavior.metric == "kl" else None


def site_modules(place: Block) -> dict[Site, str]:
    """The local names of the modules at the sites of a block."""
    return {site: place.local(place.role(site)) for site in SITES}


@torch.no_grad()
def read_sites(stream: Stream, module: nn.Module, place: Block, hidden: Tensor) -> dict[Site, Tensor]:
    """The activations [batch, length, columns] at both sites of a resident block."""
    names = site_modules(place)
    with capture(module, list(names.values())) as seen:
        stream.run(place.index, module, hidden)
    return {site: _seen(seen[name].input) for site, name in names.items()}


@torch.no_grad()
def replaced_sites(
    stream: Stream, behavior: Behavior, module: nn.Module, place: Block, inputs: Inputs, change: Change
) -> Iterator[tuple[dict[Site, Tensor], dict[Site, Tensor]]]:
    """For every micro-batch the activations at the sites of the clean run, and what replaces them, in one shape.

    `inputs` must know the run `clean`, and `base` for `resample`.
    """
    mask = mask_of(behavior)
    batches = range(len(stream.batches(mask)))
    if change == "mean":
        clean = [read_sites(stream, module, place, inputs("clean", b)) for b in batches]
        mean = {site: mean_by_position([z[site] for z in clean], mask) for site in SITES}
        for z in clean:
            yield z, {site: mean[site].expand_as(z[site]) for site in SITES}
        return
    for b in batches:
        z = read_sites(stream, module, place, inputs("clean", b))
        if change == "resample":
            yield z, read_sites(stream, module, place, inputs("base", b))
        else:
            yield z, {site: torch.zeros_like(z[site]) for site in SITES}


def pull_sites(
    stream: Stream, module: nn.Module, place: Block, hidden: Tensor, gradient: Tensor
) -> tuple[Tensor, dict[Site, Tensor]]:
    """Pulls `gradient` at a block's output back to its input and to both sites, by recomputing it on `hidden`."""
    names = site_modules(place)
    leaf = hidden.detach().requires_grad_(True)
    with torch.enable_grad(), capture(module, list(names.values())) as seen:
        output = stream.run(place.index, module, leaf)
    at = [_seen(seen[name].input) for name in names.values()]
    pulled, *sites = torch.autograd.grad(output, [leaf, *at], gradient)
    return pulled, dict(zip(names, sites, strict=True))


def by_kind(place: Block, site: Site, effect: Tensor) -> dict[str, Tensor]:
    """Effects of columns [..., columns] of a site as effects of the units that own them [..., units]."""
    if site == "down":
        return {"neuron": effect}
    heads = effect.unflatten(-1, (place.heads, place.head_dim)).sum(-1)
    return {"head": heads, "kv_group": heads.unflatten(-1, (place.kv_heads, -1)).sum(-1)}


def check_finite(stream: Stream, index: int, hidden: Tensor) -> None:
    """CheckpointError if a block's output holds NaN or infinity."""
    if not bool(hidden.isfinite().all()):
        raise CheckpointError(
            f"block {index} of {stream.anatomy.folder} computes NaN or infinity in {stream.dtype}",
            hint="open the model in float32",
        )


def _seen(x: Tensor | None) -> Tensor:
    assert x is not None  # the self-test of the hooks has proved that the site is called
    return x
