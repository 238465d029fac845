"""Exact interventions on a behavior: change some units, measure the metric. Evidence: causal.

`resample` puts in what the unit computes on the corrupted prompt at the same position: the intervention of activation
patching (Meng et al., arXiv 2202.05262; which way round and what to replace by: Zhang and Nanda, arXiv 2309.16042).
`zero` and `mean` leave the range of what the unit ever says, and are to be read with more caution. `restore` goes the
other way: everything is corrupted and the unit's clean activation is put in.

1. Clean and base run walk up, and with them every variant from the first block that it changes.
2. In a resident block the activations of both runs are read once and serve all variants.
3. A variant may change many units in many blocks at once: sets show redundancy that single units hide (three heads
   that back one another up each have an effect of zero).

Unlike `variants.measure`, which asks how far a model moves on any text, this asks what one behavior loses.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor, nn

from ..anatomy import Block
from ..behaviors import Behavior
from ..console import Advance, ignore
from ..hooks import gate, unit_columns
from ..stream import Stream
from ..units import Scores, UnitId
from .metrics import metric_values
from .results import to_scores
from .walk import (
    SITES,
    Change,
    Inputs,
    Site,
    ascend,
    base_inputs,
    check_finite,
    clean_inputs,
    final_states,
    own_reference,
    replaced_sites,
)

Edit = Callable[[int], AbstractContextManager[None]]
"""Makes a context within which the resident block is changed for micro-batch b."""
Edits = Callable[[int, nn.Module, Inputs], Mapping[str, Edit]]
"""For block i: the edits of all variants that change it; `inputs(run, b)` knows the runs `clean` and `base`."""


def patch(
    stream: Stream, behavior: Behavior, units: Sequence[UnitId], *, change: Change = "resample",
    restore: bool = False, advance: Advance = ignore,
) -> Scores:  # fmt: skip
    """The exact effect of each unit alone: metric(changed) - metric(clean), or with `restore` the metric that the
    unit's clean activation brings back to the corrupted prompt, metric(restored) - metric(corrupted).

    One walk over the weights for all units. ValueError for a unit that does not exist.
    """
    sets = {str(unit): (unit,) for unit in units}
    before, after = patch_sets(stream, behavior, sets, change=change, restore=restore, advance=advance)
    effects = torch.stack([after[name] for name in sets]) - before
    method = "restore" if restore else f"{change}-patching"
    return to_scores(method, "causal", behavior, units, effects, change=change, restore=restore)


def patch_sets(
    stream: Stream, behavior: Behavior, sets: Mapping[str, Sequence[UnitId]], *, change: Change = "resample",
    restore: bool = False, advance: Advance = ignore,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The metric [n] of the unchanged run, and that of every set of units changed together.

    With `restore` the unchanged run is the corrupted one and the units of a set get their clean activations (`change`
    is then without meaning). Ablating a complement is the set of everything else. ValueError for a unit that does not
    exist.
    """
    columns = {name: _columns(stream, units) for name, units in sets.items()}

    def edits(index: int, module: nn.Module, inputs: Inputs) -> Mapping[str, Edit]:
        mine = {name: chosen[index] for name, chosen in columns.items() if index in chosen}
        if not mine:
            return {}
        place = stream.anatomy.blocks[index]
        values = list(replaced_sites(stream, behavior, module, place, inputs, "resample" if restore else change))
        source = [clean if restore else other for clean, other in values]
        return {name: _insertion(module, place, chosen, source) for name, chosen in mine.items()}

    return measure_edits(stream, behavior, edits, start="base" if restore else "clean", advance=advance)


@torch.no_grad()
def measure_edits(
    stream: Stream, behavior: Behavior, edits: Edits, *, start: str = "clean", reference: Tensor | None = None,
    advance: Advance = ignore,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The metric [n] of the run `start` (`clean` or `base`), and that of every variant that `edits` makes of it.

    `reference` are logits for metric kl; without them it compares with the model's own clean run.
    """
    store, own = stream.store("patching"), stream.store("patching-variants")
    runs = {"clean": clean_inputs(stream, behavior), "base": base_inputs(stream, behavior)}
    batches = len(runs["clean"])
    alive: dict[str, None] = {}

    def visit(index: int, module: nn.Module, inputs: Inputs) -> None:
        changed = edits(index, module, inputs)
        for name in [*alive, *(name for name in changed if name not in alive)]:
            for b in range(batches):
                hidden = own.get((name, b), stream.device) if name in alive else inputs(start, b)
                with changed[name](b) if name in changed else contextlib.nullcontext():
                    output = stream.run(index, module, hidden)
                check_finite(stream, index, output)
                own.put((name, b), output)
            alive[name] = None

    try:
        ascend(stream, runs, store, keep=False, visit=visit, advance=advance)
        if reference is None:
            reference = own_reference(stream, behavior, final_states(stream, store, "clean"))

        def value(final: Sequence[Tensor]) -> Tensor:
            return torch.from_numpy(metric_values(stream, behavior, final, reference=reference))

        after = {name: value([own.get((name, b), stream.device) for b in range(batches)]) for name in alive}
        return value(final_states(stream, store, start)), after
    finally:
        store.clear()
        own.clear()


def _columns(stream: Stream, units: Sequence[UnitId]) -> dict[int, dict[Site, Tensor]]:
    """Layer -> site -> the columns int64 that belong to some of the units."""
    chosen: dict[int, dict[Site, list[slice]]] = {}
    for unit in units:
        if not 0 <= unit.layer < stream.depth:
            raise ValueError(f"{unit} does not exist: the model has layers 0 to {stream.depth - 1}")
        role, columns = unit_columns(stream.anatomy.blocks[unit.layer], unit.kind, unit.index)
        site: Site = "o" if role == "o" else "down"
        chosen.setdefault(unit.layer, {}).setdefault(site, []).append(columns)
    result: dict[int, dict[Site, Tensor]] = {}
    for layer, sites in chosen.items():
        result[layer] = {}
        for site, columns in sites.items():
            result[layer][site] = torch.cat([torch.arange(c.start, c.stop) for c in columns]).unique()
    return result


def _insertion(
    module: nn.Module, place: Block, columns: Mapping[Site, Tensor], source: Sequence[Mapping[Site, Tensor]]
) -> Edit:
    """Puts columns of `source[b]` in place of what enters `o` and `down`."""

    @contextlib.contextmanager
    def edit(b: int) -> Iterator[None]:
        with ExitStack() as stack:
            for site in SITES:
                if site in columns:
                    name = place.local(place.role(site))
                    stack.enter_context(gate(module, name, _put(columns[site], source[b][site])))
            yield

    return edit


def _put(columns: Tensor, value: Tensor) -> Callable[[Tensor], Tensor]:
    def rewrite(x: Tensor) -> Tensor:
        at = columns.to(x.device)
        return x.index_copy(-1, at, value.index_select(-1, at))

    return rewrite
