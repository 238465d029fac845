"""Which ranking of heads should decide what is protected? Synthetic IOI, equal bytes, everything else at 2 bits.

On four trained two-layer models (tests/data/ioi) every matrix of the blocks is rounded with one symmetric scale a
tensor: its largest weight for 2 bits, the mean size of its weights for absmean, that of ternary weight networks for
ternary. That is harsh enough to break the behavior. The last MLP and k heads stay as they are, in one of two settings:

- shared: all keys and values stay too, since heads share them; a head is its rows of q and its columns of o, so k heads
  are the same bytes whichever they are
- whole: keys and values are rounded; a head is that and its group's rows of k and v, so one head is the same bytes
  whichever it is (two might share a group), and without a head nothing stays, the last MLP neither

What differs is who chooses them:

- exact_greedy: the head that helps most beside those already chosen, measured in the rounded model
- exact_rounding: the loss measured when this head's weights alone are rounded, everything else being dense
- exact_patching: the loss when the head has its activation from the corrupted prompt
- integrated_gradients, attribution_patching: estimates of that
- magnitude: the mean square of the head's weights
- random: the mean over all choices of k heads
- none: no head

Every ranking is made four times, from 64 pairs each, and its rows are means over the four choices. `compressed` is the
mean logit difference on 256 pairs that no ranking has seen, `dense` that of the model as it is, `kl` the divergence of
the answer's distribution in nats.

  python benchmarks/protection.py
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from torch import Tensor, nn

from circuitpress.anatomy import Block
from circuitpress.behaviors import Behavior
from circuitpress.hooks import replace as swap
from circuitpress.hooks import weight_of
from circuitpress.score.attribution import attribution_patching
from circuitpress.score.gradients import integrated_gradients
from circuitpress.score.patching import Edit, measure_edits, patch
from circuitpress.score.walk import Inputs
from circuitpress.stream import Stream, open_stream
from circuitpress.units import Scores, UnitId
from common import save_results
from lab.ioi import behavior

CHECKPOINTS = Path(__file__).parent.parent / "tests" / "data" / "ioi"
SEEDS = (0, 1, 2, 3)
BITS = {"2-bit": 2.0, "absmean": float(np.log2(3)), "ternary": float(np.log2(3))}
MOST = {"shared": 3, "whole": 1}
"""Settings, and how many heads are protected at most."""

Heads = tuple[UnitId, ...]


class Case(NamedTuple):
    """What is rounded, and how."""

    setting: str
    grid: str

    @property
    def sizes(self) -> range:
        """How many heads are protected."""
        return range(1, MOST[self.setting] + 1)


@click.command()
@click.option("--pairs", default=64, show_default=True, help="that a ranking is made from")
@click.option("--draws", default=4, show_default=True, help="rankings from other pairs")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/protection.json"))
def main(pairs: int, draws: int, out: Path) -> None:
    """Compares rankings at equal bytes."""
    torch.set_num_threads(1)
    samples = [behavior(pairs, seed=20_000 + draw) for draw in range(draws)]
    test_pairs = behavior(256, seed=30_000)
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        stream = open_stream(CHECKPOINTS / f"seed-{seed}")
        for setting in MOST:
            for grid in BITS:
                about = {"checkpoint": "ioi", "seed": seed, "setting": setting, "grid": grid}
                rows += compare(stream, Case(setting, grid), samples, test_pairs, about)
    save_results(out, rows)
    sys.stderr.write(summary(rows))


def compare(
    stream: Stream, case: Case, samples: Sequence[Behavior], test_pairs: Behavior, about: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The rows of one model and grid."""
    heads = tuple(unit for unit in stream.anatomy.units() if unit.kind == "head")
    sets = {"none": (), **{name(chosen): chosen for k in case.sizes for chosen in combinations(heads, k)}}
    dense, metric = measure(stream, test_pairs, case, sets)
    _, kl = measure(stream, replace(test_pairs, metric="kl"), case, sets)
    orders = [rankings(stream, pairs, case, heads) for pairs in samples]
    chosen = {("none", 0): [()]} | {("random", k): list(combinations(heads, k)) for k in case.sizes}
    chosen |= {(ranking, k): [order[ranking][:k] for order in orders] for ranking in orders[0] for k in case.sizes}
    return [
        {
            **about, "behavior": "ioi", "ranking": ranking, "heads": k,
            "bits_per_weight": bits(stream, case, k), "metric": "logit_diff", "dense": dense,
            "compressed": float(np.mean([metric[name(units)] for units in choices])),
            "kl": float(np.mean([-kl[name(units)] for units in choices])),
            "chosen": sorted({name(units) for units in choices}) if ranking != "random" else ["all"],
        }
        for (ranking, k), choices in chosen.items()
    ]  # fmt: skip


def rankings(stream: Stream, pairs: Behavior, case: Case, heads: Heads) -> dict[str, Heads]:
    """Heads in the order in which each ranking would protect them."""
    alone = {name((head,)): (head,) for head in heads}
    dense, rounded = measure(stream, pairs, case, alone, only=True)
    return {
        "exact_greedy": greedy(stream, pairs, case, heads),
        "exact_rounding": ordered(heads, [dense - rounded[name((head,))] for head in heads]),
        "exact_patching": by_effect(patch(stream, pairs, heads), heads),
        "integrated_gradients": by_effect(integrated_gradients(stream, pairs), heads),
        "attribution_patching": by_effect(attribution_patching(stream, pairs), heads),
        "magnitude": ordered(heads, magnitudes(stream, heads)),
    }


def greedy(stream: Stream, pairs: Behavior, case: Case, heads: Heads) -> Heads:
    """Heads in the order in which each adds most to those before it, as many as the setting takes."""
    chosen: Heads = ()
    for _ in case.sizes:
        options = {name((*chosen, head)): (*chosen, head) for head in heads if head not in chosen}
        _, metric = measure(stream, pairs, case, options)
        chosen = options[max(options, key=lambda label: metric[label])]
    return chosen


def ordered(heads: Heads, loss: Sequence[float]) -> Heads:
    """The head with the largest loss first."""
    return tuple(heads[n] for n in np.argsort(-np.array(loss), kind="stable"))


def by_effect(scores: Scores, heads: Heads) -> Heads:
    """The head whose change lowers the metric most first."""
    effect = dict(zip(scores.units, scores.values.tolist(), strict=True))
    return ordered(heads, [-effect[head] for head in heads])


def magnitudes(stream: Stream, heads: Heads) -> list[float]:
    """Mean square of the weights of each head."""
    result = {}
    for place in stream.anatomy.blocks:
        with stream.block(place.index) as module:
            q, o = (weight_of(module, place, place.role(role)) for role in ("q", "o"))
            for head in heads:
                if head.layer == place.index:
                    mine = mask(place, (head,))
                    result[head] = float((q[mine].square().sum() + o[:, mine].square().sum()) / (2 * q[mine].numel()))
    return [result[head] for head in heads]


def measure(
    stream: Stream, pairs: Behavior, case: Case, sets: Mapping[str, Heads], *, only: bool = False
) -> tuple[float, dict[str, float]]:
    """The mean metric of the dense model, and with each set of heads kept while all else is rounded.

    With `only` it is the other way round: the set's weights are rounded and all else is kept.
    """

    def edits(index: int, module: nn.Module, inputs: Inputs) -> dict[str, Edit]:  # noqa: ARG001
        place = stream.anatomy.blocks[index]
        weights = {matrix.role: weight_of(module, place, matrix) for matrix in place.matrices}
        rounded = {role: round_tensor(weight, case.grid) for role, weight in weights.items()}
        found = {}
        for label, heads in sets.items():
            mine = mask(place, heads)
            changed: dict[str, Tensor] = {}
            for role, weight in weights.items():
                owned = {"q": mine[:, None], "o": mine[None, :]}.get(role, torch.zeros(1, 1, dtype=torch.bool))
                if case.setting == "whole" and role in "kv":
                    owned = mine.view(place.kv_heads, -1, place.head_dim).any(1).flatten()[:, None]
                mlp = role in ("gate", "up", "down") and index == stream.depth - 1
                stays = mlp and bool(heads) if case.setting == "whole" else mlp or role in "kv"
                kept = ~owned if only else owned | stays
                changed[place.local(place.role(role))] = torch.where(kept, weight, rounded[role])
            found[label] = weight_edit(module, changed)
        return found

    before, after = measure_edits(stream, pairs, edits)
    return float(before.mean()), {label: float(values.mean()) for label, values in after.items()}


def weight_edit(module: nn.Module, weights: Mapping[str, Tensor]) -> Edit:
    """The same weights for all prompts."""

    def edit(b: int) -> AbstractContextManager[None]:  # noqa: ARG001
        return swap(module, weights, transposed=False)

    return edit


def mask(place: Block, heads: Heads) -> Tensor:
    """Rows of q and columns of o that belong to some of `heads`, bool [heads * head_dim]."""
    mine = torch.zeros(place.heads, place.head_dim, dtype=torch.bool)
    mine[[head.index for head in heads if head.layer == place.index]] = True
    return mine.flatten()


def round_tensor(weight: Tensor, grid: str) -> Tensor:
    """The nearest point of a symmetric grid with one scale for the whole matrix.

    `absmean` is Ma et al., arXiv 2402.17764, eq. 1 to 3; `ternary` is Li et al., arXiv 1605.04711: weights above 0.7 of
    the mean size become the mean of those.
    """
    if grid == "2-bit":
        scale = weight.abs().max()
        return (weight / scale).round().clamp(-2, 1) * scale
    if grid == "absmean":
        scale = weight.abs().mean()
        return (weight / scale).round().clamp(-1, 1) * scale
    above = weight.abs() > 0.7 * weight.abs().mean()
    return weight.sign() * above * weight.abs()[above].mean()


def bits(stream: Stream, case: Case, k: int) -> float:
    """Bits per weight of the blocks: what is kept has 16."""
    place = stream.anatomy.blocks[-1]
    kept = sum(matrix.numel for matrix in place.matrices if matrix.role in ("gate", "up", "down"))
    head = 2 * place.head_dim * stream.anatomy.hidden
    if case.setting == "shared":
        kept += sum(m.numel for block in stream.anatomy.blocks for m in block.matrices if m.role in "kv")
        kept += k * head
    else:
        kept = (kept + 2 * head) * k  # and as much again for its group's keys and values
    scales = 16 * sum(len(block.matrices) for block in stream.anatomy.blocks)
    total = stream.anatomy.linear_numel
    return (16 * kept + BITS[case.grid] * (total - kept) + scales) / total


def name(heads: Heads) -> str:
    """A label for a set of heads."""
    return "+".join(map(str, sorted(heads))) or "none"


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means over seeds, as a table."""
    lines = []
    for setting, grid in product(MOST, BITS):
        mine = [row for row in rows if (row["setting"], row["grid"]) == (setting, grid)]
        lines.append(f"{setting}, {grid}: dense {np.mean([row['dense'] for row in mine]):.1f}")
        for ranking in dict.fromkeys(row["ranking"] for row in mine):
            by_k: dict[int, list[float]] = {}
            for row in mine:
                if row["ranking"] == ranking:
                    by_k.setdefault(row["heads"], []).append(row["compressed"])
            lines.append(f"  {ranking:<22}" + "  ".join(f"{np.mean(values):6.2f}" for values in by_k.values()))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
