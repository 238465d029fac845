"""What changed between two plans of one model: decisions, bytes and nats, in all and by layer."""

from dataclasses import asdict, dataclass
from typing import Any

from ..units import Decision, Plan


@dataclass(frozen=True)
class Change:
    """One group whose format differs; `before` or `after` is None where only the other plan has the group."""

    group: str
    layer: int
    before: str | None
    after: str | None
    bytes_delta: int
    nats_delta: float


@dataclass(frozen=True)
class LayerChange:
    """The sum over one layer; layers without a change are left out."""

    layer: int
    changed: int
    bytes_delta: int
    nats_delta: float


@dataclass(frozen=True)
class Difference:
    """Plan B minus plan A; `changes` are ordered by how much they move the price, largest first."""

    decisions: int
    bits_per_weight: tuple[float, float]
    bytes_delta: int
    nats_delta: float
    changes: tuple[Change, ...]
    layers: tuple[LayerChange, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain lists and dictionaries."""
        return asdict(self) | {"changed": len(self.changes)}


def diff(plan_a: Plan, plan_b: Plan) -> Difference:
    """What it takes to get from `plan_a` to `plan_b`; groups are matched by name."""
    before = {decision.group.name: decision for decision in plan_a.decisions}
    after = {decision.group.name: decision for decision in plan_b.decisions}
    names = list(before | after)
    changes = [_change(before.get(name), after.get(name)) for name in names]
    changes = [change for change in changes if change.before != change.after or change.bytes_delta]
    changes.sort(key=lambda change: (-abs(change.nats_delta), change.layer, change.group))
    layers = []
    for layer in sorted({change.layer for change in changes}):
        mine = [change for change in changes if change.layer == layer]
        nbytes, nats = sum(change.bytes_delta for change in mine), sum(change.nats_delta for change in mine)
        layers.append(LayerChange(layer, len(mine), nbytes, nats))
    return Difference(
        decisions=len(names),
        bits_per_weight=(plan_a.bits_per_weight, plan_b.bits_per_weight),
        bytes_delta=plan_b.linear_bytes - plan_a.linear_bytes,
        nats_delta=plan_b.predicted_kl - plan_a.predicted_kl,
        changes=tuple(changes),
        layers=tuple(layers),
    )


def _change(a: Decision | None, b: Decision | None) -> Change:
    known = a or b
    assert known is not None
    nbytes = (b.nbytes if b else 0) - (a.nbytes if a else 0)
    nats = (b.nats if b else 0.0) - (a.nats if a else 0.0)
    return Change(known.group.name, known.group.layer, a and a.format, b and b.format, nbytes, nats)
