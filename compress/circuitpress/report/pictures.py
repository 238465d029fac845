"""From a run's files to its figures: what each is drawn from, and how a reader who cannot see it is told of it."""

from dataclasses import dataclass

import numpy as np

from ..plan import thin
from ..plan.constraints import nominal_bits
from ..units import DROP
from .figures import Cell, bit_map, check_plot, heat_map, pareto_plot, spread_map, task_plot
from .read import RunFiles
from .svg import two_digits

FRONT = 40
TASKS = 24
"""Tasks that are drawn at most; the table has them all."""


@dataclass(frozen=True)
class PriceMap:
    """The prices of one `format` [layers][roles] as a figure and as text."""

    figure: str
    format: str
    roles: tuple[str, ...]
    rows: tuple[tuple[int, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Check:
    """Prices against exact interventions: `count` of them, of which `left_out` have no place on a logarithmic axis."""

    figure: str | None
    count: int
    left_out: int
    spearman: str | None
    ratio: str | None


def place_of(run: RunFiles, module: str, layer: int) -> tuple[int, str]:
    """The layer and role of a module; one that the anatomy does not know keeps the last part of its name."""
    return run.roles.get(module, (layer, module.rpartition(".")[2]))


def draw_bits(run: RunFiles) -> str:
    """Which matrix got which bits."""
    pieces = []
    for decision in run.plan.decisions:
        for segment in decision.group.segments:
            layer, role = place_of(run, segment.module, decision.group.layer)
            cell = Cell(layer, role, nominal_bits(decision.format), segment.numel, decision.protected)
            pieces.append((segment.module, segment.start, cell))
    cells = [cell for _, _, cell in sorted(pieces, key=lambda piece: (piece[2].layer, piece[0], piece[1]))]
    kinds = sorted({cell.bits for cell in cells})
    label = f"Bit map: {len({cell.layer for cell in cells})} blocks, formats from {kinds[0]:g} to {kinds[-1]:g} bits"
    return bit_map(cells, run.role_names, label=label)


def draw_prices(run: RunFiles) -> PriceMap:
    """Nats by layer and matrix in one format, the one nearest to 3 bits; segments of a matrix are added up."""
    prices = run.prices
    widths = [abs(nominal_bits(name) - 3) if name != DROP else np.inf for name in prices.formats]
    column = int(np.argmin(widths))
    layers = sorted({group.layer for group in prices.groups})
    table = np.full((len(layers), len(run.role_names)), np.nan)
    for i, group in enumerate(prices.groups):
        for segment in group.segments:
            layer, role = place_of(run, segment.module, group.layer)
            if role in run.role_names and np.isfinite(prices.nats[i, column]):
                at = layers.index(layer), run.role_names.index(role)
                table[at] = np.nansum([table[at], prices.nats[i, column] * segment.numel / group.numel])
    name = prices.formats[column]
    label = f"Price map: nats per token that each matrix costs alone in {name}, by block"
    texts = [tuple(two_digits(value) if np.isfinite(value) else "" for value in row) for row in table]
    values = zip(layers, texts, strict=True)
    figure = heat_map(table, layers, run.role_names, unit="nats per token", label=label)
    return PriceMap(figure, name, run.role_names, tuple(values))


def draw_heads(run: RunFiles) -> str | None:
    """Scores of attention heads [layers, heads]; None without scores."""
    values, layers = _scores(run, "head")
    if not layers:
        return None
    table = np.full((len(layers), max(map(len, values))), np.nan)
    for i, row in enumerate(values):
        table[i, : len(row)] = row
    step = max(1, table.shape[1] // 16)
    names = [str(j) if j % step == 0 else "" for j in range(table.shape[1])]
    label = "Heads: estimated KL in nats per token without each attention head, by block"
    return heat_map(table, layers, names, unit="nats per token", label=label)


def draw_neurons(run: RunFiles) -> str | None:
    """The spread of the neurons' scores in every layer; None without scores."""
    values, layers = _scores(run, "neuron")
    label = "Neurons: spread of the estimated KL without each neuron, by block"
    return spread_map(values, layers, unit="nats per token without the neuron", label=label) if layers else None


def _scores(run: RunFiles, kind: str) -> tuple[list[np.ndarray], list[int]]:
    if run.scores is None:
        return [], []
    rows: dict[int, dict[int, float]] = {}
    for unit, value in zip(run.scores.units, run.scores.values.tolist(), strict=True):
        if unit.kind == kind:
            rows.setdefault(unit.layer, {})[unit.index] = value
    return [np.array([row[i] for i in sorted(row)]) for _, row in sorted(rows.items())], sorted(rows)


def draw_front(run: RunFiles) -> str:
    """The front, the probes and this plan; points beyond what a plan would take are left out."""
    plan, fidelity = run.plan, run.fidelity
    most = max([9.0, plan.bits_per_weight * 1.3, *(probe.bits_per_weight for probe in run.probes)])
    front = [point for point in run.front if point.bits_per_weight <= most]
    label = f"Pareto front: KL against bits per weight, this plan at {plan.bits_per_weight:.2f} bits"
    at = plan.bits_per_weight
    return pareto_plot(
        [(point.bits_per_weight, point.predicted_kl) for point in thin(front, most=FRONT)],
        [(p.bits_per_weight, p.predicted_kl_corrected) for p in thin(front, most=FRONT) if p.predicted_kl_corrected],
        [(probe.label, probe.bits_per_weight, probe.measured_kl) for probe in run.probes],
        plan_predicted=(at, plan.predicted_kl),
        plan_measured=None if fidelity is None else (at, fidelity["kl"], fidelity.get("kl_stderr") or 0.0),
        label=label,
    )


def draw_tasks(run: RunFiles) -> str | None:
    """Changes of the tasks that were asked for; None where no paired error is known."""
    rows = [
        (f"{row['task']} {row['metric']}", row["difference"], row["difference_stderr"])
        for row in run.tasks.get("rows", [])
        if row["asked"] and row["difference_stderr"] is not None
    ]
    label = f"Tasks: change of {len(rows)} scores from the original to the compressed model"
    return task_plot(rows[:TASKS], label=label) if rows else None


def draw_check(run: RunFiles) -> Check | None:
    """Prices against interventions; None if none were made."""
    if run.exact is None or not run.exact.rows:
        return None
    rows = run.exact.rows
    points = [
        (row["format"], row["price"], row["exact_kl"]) for row in rows if row["price"] > 0 and row["exact_kl"] > 0
    ]
    label = f"Check of prices: measured KL of {len(points)} single changes against their price"
    ratio, rank = run.exact.median_ratio, run.exact.spearman
    return Check(
        figure=check_plot(points, label=label) if points else None,
        count=len(rows),
        left_out=len(rows) - len(points),
        spearman=None if rank is None else f"{rank:.2f}",
        ratio=None if ratio is None else f"{ratio:.2f}",
    )
