"""Attribution patching: one gradient for all units. Cheap, and not to be trusted alone. Evidence: gradient.

    effect = sum_t (z'_t - z_t) . dm/dz_t        at the clean prompt

(Nanda 2023; Syed et al., arXiv 2310.10348.) Where a norm or a softmax is saturated the gradient says "no effect" of
what decides everything: on four trained two-layer models it put the decisive head 11 to 22 times too low. It is offered
as a prefilter, labelled as such, with the two repairs of AtP* (Kramar et al., arXiv 2403.00745):

- `part_effects` of queries and keys recomputes the softmax exactly (the QK fix). A' v - A v is the change of the head's
  output z when its queries (or keys) are the corrupted ones, so running the block once with the outputs of that
  projection exchanged gives it for all heads at once, whatever comes between projection and softmax (rotary tables,
  norms); only what follows the head is linear. Unlike in the paper all positions of a key are exchanged together.
- `drop=True` (GradDrop): direct and indirect effects that cancel at this prompt look like none. For every block l the
  gradient is taken again without what flows through block l, and the result is the mean of the absolute values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from ..anatomy import Block
from ..behaviors import Behavior
from ..console import Advance, ignore
from ..hooks import capture, emit
from ..store import Store
from ..stream import Stream
from ..units import Scores, UnitId
from .gradients import input_gradients, unit_effects
from .metrics import fold, metric_gradients
from .results import to_scores
from .walk import (
    SITES,
    Change,
    Inputs,
    Pull,
    Site,
    ascend,
    base_inputs,
    by_kind,
    clean_inputs,
    descend,
    final_states,
    own_reference,
    pull_sites,
    read_sites,
    replaced_sites,
)

At = Literal["clean", "corrupted", "both"]
Part = Literal["query", "key", "value"]
WARNING = "one gradient misses saturated units: check the ranking by patching before acting on it"
_SHARES: dict[At, list[float]] = {"clean": [1.0], "corrupted": [0.0], "both": [0.0, 1.0]}


def attribution_patching(
    stream: Stream, behavior: Behavior, *, at: At = "clean", drop: bool = False, change: Change = "resample",
    advance: Advance = ignore,
) -> Scores:  # fmt: skip
    """First-order effects of all heads, key-value groups and neurons, with the gradient at one or both ends.

    With `drop` (GradDrop, at the clean prompt only) the values have no sign: they are means of absolute values.
    """
    about = {"at": at, "change": change, "grad_drop": drop, "warning": WARNING}
    if drop:
        if at != "clean":
            raise ValueError(f"grad-drop takes the gradient at the clean prompt, not {at}")
        units, effects = _dropped(stream, behavior, change, advance)
        about["sign"] = "none: mean of absolute values"
    else:
        units, effects = input_gradients(stream, behavior, _SHARES[at], change=change, advance=advance)
    return to_scores("attribution-patching", "gradient", behavior, units, effects, **about)


def part_effects(
    stream: Stream, behavior: Behavior, part: Part, *, fix: bool = True, advance: Advance = ignore
) -> Scores:
    """First-order effects of corrupting only the queries of each head, or the keys or values of each key-value group.

    `fix` recomputes attention with the corrupted part; without it the gradient goes through the softmax too, which is
    what plain attribution patching does (for values both are the same: z is linear in them).
    """
    store = stream.store("part-effects")
    try:
        ascend(stream, {"clean": clean_inputs(stream, behavior), "base": base_inputs(stream, behavior)}, store,
               advance=advance)  # fmt: skip
        final = final_states(stream, store, "clean")
        reference = own_reference(stream, behavior, final)
        gradients = {"clean": metric_gradients(stream, behavior, final, reference=reference)}
        units: list[list[UnitId]] = []
        parts: list[Tensor] = []

        def visit(index: int, module: nn.Module, inputs: Inputs, pull: Pull) -> None:
            place, pieces = stream.anatomy.blocks[index], []
            for b in range(len(gradients["clean"])):
                above = gradients["clean"][b]
                g = pull("clean", b)
                if fix:
                    z = read_sites(stream, module, place, inputs("clean", b))["o"]
                    with exchanged(stream, module, place, part, inputs("base", b)):
                        changed = read_sites(stream, module, place, inputs("clean", b))["o"]
                    effect = by_kind(place, "o", ((changed - z).float() * g["o"].float()).sum(1))
                    pieces.append(effect["head" if part == "query" else "kv_group"])
                else:
                    pieces.append(_through_softmax(stream, module, place, part, inputs, b, above))
            parts.append(torch.cat(pieces))
            kind, count = ("head", place.heads) if part == "query" else ("kv_group", place.kv_heads)
            units.append([UnitId(index, kind, i) for i in range(count)])

        descend(stream, store, gradients, visit, advance=advance)
        effects = fold(behavior, torch.cat(parts[::-1], dim=1).T)
        chosen = [unit for block in units[::-1] for unit in block]
        about = {"part": part, "qk_fix": fix, "warning": WARNING}
        return to_scores(f"attribution-patching-{part}", "gradient", behavior, chosen, effects, **about)
    finally:
        store.clear()


def part_rows(place: Block, part: Part) -> tuple[str, slice]:
    """Where queries, keys or values come out: the local module name, and its outputs that are this part."""
    roles = {matrix.role: matrix for matrix in place.matrices}
    number = ("query", "key", "value").index(part)
    if "qkv" in roles:
        width = place.heads * place.head_dim
        return place.local(roles["qkv"]), slice(number * width, (number + 1) * width)
    matrix = roles["qkv"[number]]
    return place.local(matrix), slice(0, matrix.rows)


@contextmanager
def exchanged(stream: Stream, module: nn.Module, place: Block, part: Part, other: Tensor) -> Iterator[None]:
    """Puts the queries (keys, values) that the block computes from `other` in place of its own."""
    name, rows = part_rows(place, part)
    with torch.no_grad(), capture(module, [name]) as seen:
        stream.run(place.index, module, other)
    value = seen[name].output
    assert value is not None

    def rewrite(y: Tensor) -> Tensor:
        y = y.clone()
        y[..., rows] = value[..., rows]
        return y

    with emit(module, name, rewrite):
        yield


def _through_softmax(
    stream: Stream, module: nn.Module, place: Block, part: Part, inputs: Inputs, b: int, gradient: Tensor
) -> Tensor:
    """(y' - y) . dm/dy [rows, units] at the outputs of one projection."""
    name, rows = part_rows(place, part)
    with torch.no_grad(), capture(module, [name]) as seen:
        stream.run(place.index, module, inputs("base", b))
    other = seen[name].output
    leaf = inputs("clean", b).detach().requires_grad_(True)
    with torch.enable_grad(), capture(module, [name]) as seen:
        output = stream.run(place.index, module, leaf)
    y = seen[name].output
    assert y is not None and other is not None
    g = torch.autograd.grad(output, y, gradient)[0]
    effect = ((other - y.detach()).float() * g.float())[..., rows].sum(1)
    return effect.unflatten(-1, (-1, place.head_dim)).sum(-1)


def _dropped(stream: Stream, behavior: Behavior, change: Change, advance: Advance) -> tuple[tuple[UnitId, ...], Tensor]:
    """Units and 1/(L-1) sum_l |effect without the gradient through block l| float32 [units, n].

    Above block l nothing differs from the plain gradient, so a run of its own begins at l: where the gradient at the
    block's input is taken to be that at its output.
    """
    store = stream.store("grad-drop")
    try:
        ascend(stream, {"clean": clean_inputs(stream, behavior), "base": base_inputs(stream, behavior)}, store,
               advance=advance)  # fmt: skip
        final = final_states(stream, store, "clean")
        runs: dict[str, list[Tensor]] = {
            "plain": metric_gradients(
                stream, behavior, final, reference=own_reference(stream, behavior, final)
            )
        }  # fmt: skip
        parts: list[Tensor] = []
        for i in reversed(range(stream.depth)):
            with stream.block(i) as module:
                parts.append(_drop_block(stream, behavior, module, i, store, runs, change))
            advance(1, f"block {i}, gradients")
        return stream.anatomy.units(), torch.cat(parts[::-1], dim=1).T / max(1, stream.depth - 1)
    finally:
        store.clear()


def _drop_block(
    stream: Stream, behavior: Behavior, module: nn.Module, index: int, store: Store,
    runs: dict[str, list[Tensor]], change: Change,
) -> Tensor:  # fmt: skip
    """Sums of absolute effects [n, units] of one block; takes every run of gradients down and adds this block's own."""
    place = stream.anatomy.blocks[index]

    def inputs(run: str, b: int) -> Tensor:
        return store.get((run, index, b), stream.device)

    skipped = [gradient.clone() for gradient in runs["plain"]]
    effects: dict[str, list[Tensor]] = {run: [] for run in runs}
    for b, (z, other) in enumerate(replaced_sites(stream, behavior, module, place, inputs, change)):
        gap: dict[Site, Tensor] = {site: other[site] - z[site] for site in SITES}
        for run, gradient in runs.items():
            gradient[b], g = pull_sites(stream, module, place, inputs("clean", b), gradient[b])
            effects[run].append(unit_effects(place, gap, g))
    runs[f"drop-{index}"] = skipped
    # Dropping a block below this one leaves its gradient as it is: `index` of the runs are the plain one here.
    total = torch.zeros(())
    for run, pieces in effects.items():
        size = fold(behavior, torch.cat(pieces).T).T.abs()
        total = total + size * (index if run == "plain" else 1)
    return total if stream.depth > 1 else fold(behavior, torch.cat(effects["plain"]).T).T.abs()
