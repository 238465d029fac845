"""The prune stage: a smaller dense checkpoint for everything after it, if that is what loses least.

By fraction (`prune.neurons`, `prune.kv_groups`) the widths are given: price, order, build, measure.

By search (`drop` in plan.formats), pruning and bits compete for one budget:

1. Price every format on the original (the score stage's work, kept if nothing is pruned), and every width of a ladder.
2. Bits alone: plan, apply, and measure KL on held-out text.
3. For all pairs of widths, predict the best that the budget buys: the price of the drops, plus the plan over the prices
   of formats scaled to the weights that stay. Build the best pair and measure it dense. Second-order prices of drops
   are too low by a factor that grows with them (1.7 at a quarter of the neurons of stories260K, 2 at half), so a
   monotone curve through the pairs measured so far corrects the others.
4. A pair that loses less by its drops alone than the best plan so far is priced, planned, applied and measured whole.
5. Repeat until the best prediction has been measured, at most BUILDS times; then the pair for which dropping alone fits
   the budget has its turn. Of all models that were measured whole, the best is kept.

Bits alone and drops alone are both among them, so the joint plan is never worse than either on the held-out text.
"""

import logging
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InfeasibleBudget
from ..plan import Budget, Curve, solve
from ..units import DROP, Prices, Probe
from ..widths import Widths, full_widths, heads_can_leave, narrow
from .folder import clear
from .planning import block_prices, plan_and_front, pose_problem
from .protect import protected_units, refuse_too_narrow

if TYPE_CHECKING:
    import circuitpress.prune
    import circuitpress.run.session

log = logging.getLogger(__name__)

BUILDS = 4
"""Pairs of widths that are built in a search."""

Work = Callable[["circuitpress.run.session.Session"], None]


def prune_model(session: "circuitpress.run.session.Session", score: Work, apply: Work) -> None:
    """Prunes as the recipe says and writes prune.json; the folder `pruned` is there if anything left.

    `score` and `apply` do the work of those stages on a session.
    """
    document: dict[str, Any] = {"widths": None, "stay": None, "kl": 0.0, "candidates": []}
    if session.recipe.prune.is_asked:
        document |= _by_fraction(session)
    elif DROP in session.recipe.plan.formats:
        document |= _Search(session, score, apply).run()
    session.write("prune.json", document)
    clear(session.path, ("pruning",))


def _by_fraction(session: "circuitpress.run.session.Session") -> dict[str, Any]:
    from ..prune import price_drops

    widths = session.least_widths
    if widths == full_widths(session.original_anatomy):
        return {}
    keep = protected_units(session.original_anatomy, session.recipe.plan.protect)
    refuse_too_narrow(session.original_anatomy, widths, keep)
    calibration, _, _ = session.windows
    with session.console.progress("prune", 2 * session.original_anatomy.work) as advance:
        drops = price_drops(
            session.original, calibration.ids, neurons=(widths.neurons,), kv_groups=(widths.kv_groups,), keep=keep,
            draws=session.recipe.score.draws, seed=session.recipe.data.seed, folder=session.path / "pruning" / "drops",
            advance=advance,
        )  # fmt: skip
        stay = _build(session, drops, widths, advance)
    kl = _divergence(session, session.path / "pruned")
    log.info("pruned to %s: price %.4g, KL %.4g", widths, drops.price(widths), kl)
    return _entry(widths, stay, kl) | {"predicted_kl": drops.price(widths)}


def _build(
    session: "circuitpress.run.session.Session", drops: "circuitpress.prune.Drops", widths: Widths, advance: Any
) -> dict[int, dict[str, Any]]:
    """Writes the folder `pruned` of a session; returns the units that stay."""
    from ..prune import prune

    full = full_widths(session.original_anatomy)
    stay = {
        layer: {
            "neuron": drops.stay("neuron", layer, widths.neurons, full.neurons),
            "kv_group": drops.stay("kv_group", layer, widths.kv_groups, full.kv_groups),
        }
        for layer in range(session.original.depth)
    }
    calibration, _, _ = session.windows
    prune(
        session.original, calibration.ids, stay, shards=session.path / "pruning" / "shards",
        out=session.path / "pruned", advance=advance,
    )  # fmt: skip
    return stay


def _divergence(session: "circuitpress.run.session.Session", model: Path) -> float:
    """KL(original || model) on the held-out windows."""
    from ..evaluate import fidelity

    _, held_out, _ = session.windows
    return fidelity(session.open(model), session.original, held_out.ids).divergence.kl


def _entry(widths: Widths, stay: Mapping[int, Mapping[str, Any]], kl: float) -> dict[str, Any]:
    listed = {str(layer): {kind: units.tolist() for kind, units in kinds.items()} for layer, kinds in stay.items()}
    return {"widths": {"neurons": widths.neurons, "kv_groups": widths.kv_groups}, "stay": listed, "kl": kl}


class _Search:
    """One search; every step leaves files in the folder `pruning`, from which a resumed run goes on."""

    def __init__(self, session: "circuitpress.run.session.Session", score: Work, apply: Work) -> None:
        self.session, self.score, self.apply = session, score, apply
        self.full = full_widths(session.original_anatomy)
        self.dense = session.branch("pruning/bits alone")
        self.alone = _dense_pairs(session)
        self.drop_kl: dict[Widths, float] = {}
        self.stay: dict[Widths, dict[int, dict[str, Any]]] = {}
        self.whole: dict[Widths, float] = {}

    def run(self) -> dict[str, Any]:
        self._measure(self.full)
        self.drops = self._drops()
        bits = self._bits()
        for _ in range(BUILDS):
            widths = self._best(bits)
            if widths is None or widths in self.drop_kl:
                break
            self._try(widths)
        if self.alone:
            self._try(min(self.alone, key=self._drop_price))
        if not self.whole:
            self._measure(self.full, feasible=True)  # raises what nothing could meet
        best = min(self.whole, key=lambda widths: self.whole[widths])
        self._keep(best)
        return self._document(best)

    def _drops(self) -> "circuitpress.prune.Drops":
        from ..prune import default_ladder, price_drops

        session, (calibration, _, _) = self.session, self.session.windows
        keep = protected_units(session.original_anatomy, session.recipe.plan.protect)
        neurons, groups = default_ladder(session.original)
        least = {kind: _most_in_a_layer(keep, kind) for kind in ("neuron", "kv_group")}
        self.alone = [w for w in self.alone if w.neurons >= least["neuron"] and w.kv_groups >= least["kv_group"]]
        neurons = {*neurons, *(widths.neurons for widths in self.alone)}
        groups = {*groups, *(widths.kv_groups for widths in self.alone)}
        with session.console.progress("prices of drops", session.original_anatomy.work) as advance:
            return price_drops(
                session.original, calibration.ids, neurons=[n for n in neurons if n >= least["neuron"]],
                kv_groups=[n for n in groups if n >= least["kv_group"]], keep=keep, draws=session.recipe.score.draws,
                seed=session.recipe.data.seed, folder=session.path / "pruning" / "drops", advance=advance,
            )  # fmt: skip

    def _bits(self) -> dict[Widths, float]:
        """The predicted price of the best plan for the weights that stay, for every pair that has one."""
        prices, result = block_prices(self.dense), {}
        for neurons in self.drops.widths["neuron"]:
            for groups in self.drops.widths["kv_group"]:
                widths = Widths(neurons, groups)
                problem = pose_problem(scaled(prices, self.session, widths), self.dense, self.dense.outer)
                try:
                    result[widths] = solve(problem.prices, problem.constraints, seconds=1.0).nats
                except InfeasibleBudget:
                    continue
        return result

    def _drop_price(self, widths: Widths) -> float:
        """The KL to expect of the drops alone: measured, or their price through the curve of those that were."""
        if widths in self.drop_kl:
            return self.drop_kl[widths]
        known = [Probe(str(w), 0.0, self.drops.price(w), kl) for w, kl in self.drop_kl.items()]
        return Curve.fit(known)(self.drops.price(widths))

    def _best(self, bits: Mapping[Widths, float]) -> Widths | None:
        pairs = [widths for widths in bits if widths != self.full]
        return min(pairs, key=lambda widths: self._drop_price(widths) + bits[widths], default=None)

    def _try(self, widths: Widths) -> None:
        """Builds a pair and measures it dense; measures it whole if its drops leave a chance."""
        if widths in self.drop_kl:
            return
        branch = self._branch(widths)
        with self.session.console.progress(f"prune to {widths}", self.session.original_anatomy.work) as advance:
            self.stay[widths] = _build(branch, self.drops, widths, advance)
        self.drop_kl[widths] = _divergence(branch, branch.working)
        branch.write("prune.json", _entry(widths, self.stay[widths], self.drop_kl[widths]))
        if self.drop_kl[widths] < min(self.whole.values(), default=float("inf")):
            self._measure(widths)

    def _measure(self, widths: Widths, *, feasible: bool = False) -> None:
        """Prices, plans, applies and measures one pair; nothing if no plan fits, unless that must raise."""
        branch = self._branch(widths)
        if not (branch.path / "prices.safetensors").exists():
            self.score(branch)
        branch.write("probes.json", [])
        try:
            plan, _ = plan_and_front(branch)
        except InfeasibleBudget:
            if feasible:
                raise
            return
        plan.save(branch.path / "plan.json")
        self.apply(branch)
        self.whole[widths] = _divergence(branch, branch.path / "model")
        log.info("%s: KL %.4g with bits", "bits alone" if widths == self.full else widths, self.whole[widths])

    def _branch(self, widths: Widths) -> "circuitpress.run.session.Session":
        if widths == self.full:
            return self.dense
        return self.session.branch(f"pruning/{widths.neurons}-{widths.kv_groups}")

    def _keep(self, best: Widths) -> None:
        """Takes over the prices of the best candidate, and its pruned checkpoint."""
        source, target = self._branch(best).path, self.session.path
        clear(target, ("pruned",))
        for name in ("pricing", "pruned"):
            if (source / name).exists():
                partial = target / f".{name}.partial"
                clear(target, (partial.name, name))
                shutil.copytree(source / name, partial, copy_function=_link)
                partial.replace(target / name)
        for file in [path for stem in ("scores", "outer", "prices") for path in sorted(source.glob(f"{stem}.*"))]:
            (target / file.name).unlink(missing_ok=True)
            _link(str(file), str(target / file.name))
        self.session.folder.finish("score", 0.0)

    def _document(self, best: Widths) -> dict[str, Any]:
        candidates = [
            {
                "neurons": widths.neurons,
                "kv_groups": widths.kv_groups,
                "drop_kl": self.drop_kl.get(widths, 0.0),
                "predicted_drop_kl": self.drops.price(widths) if widths != self.full else 0.0,
                "kl": self.whole.get(widths),
            }
            for widths in {**self.whole, **self.drop_kl}
        ]
        chosen = {} if best == self.full else _entry(best, self.stay[best], self.drop_kl[best])
        return chosen | {"candidates": candidates}


def scaled(prices: Prices, session: "circuitpress.run.session.Session", widths: Widths) -> Prices:
    """`prices` as they would be for the weights that stay: bytes and nats in proportion to each matrix's size."""
    before = session.original_anatomy
    after = narrow(before, widths)
    sizes = {matrix.module: matrix.numel for block in before.blocks for matrix in block.matrices}
    share = {matrix.module: matrix.numel / sizes[matrix.module] for block in after.blocks for matrix in block.matrices}
    factor = np.array([share[group.segments[0].module] for group in prices.groups])[:, None]
    nbytes = np.ceil(prices.nbytes * factor).astype(np.int64)
    return replace(prices, nbytes=nbytes, nats=prices.nats * factor, original_numel=before.linear_numel)


def _dense_pairs(session: "circuitpress.run.session.Session") -> list[Widths]:
    """For each number of groups the most neurons with which dropping alone fits the budget."""
    from ..formats import CastFormat, parse

    anatomy, recipe = session.original_anatomy, session.recipe.plan
    floating = [form for name in session.names(recipe.formats) if isinstance(form := parse(name), CastFormat)]
    if not floating:
        return []
    width = min(form.nbytes(1, 1) for form in floating)
    cap = Budget.parse(recipe.budget).linear_bytes(anatomy.linear_numel, anatomy.other_bytes + anatomy.header_bytes)
    full, result = full_widths(anatomy), []
    for groups in range(1, full.kv_groups + 1) if heads_can_leave(anatomy) else (full.kv_groups,):
        neurons = bisect_right(
            range(1, full.neurons + 1),
            cap,
            key=lambda n, groups=groups: width * narrow(anatomy, Widths(n, groups)).present_numel,
        )
        if neurons and Widths(neurons, groups) != full:
            result.append(Widths(neurons, groups))
    return result


def _most_in_a_layer(keep: Sequence | frozenset, kind: str) -> int:
    layers = [unit.layer for unit in keep if unit.kind == kind]
    return max((layers.count(layer) for layer in set(layers)), default=0)


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target
