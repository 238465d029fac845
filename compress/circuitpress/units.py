"""The values that flow between the stages: frozen, typed, saved as safetensors + json. No torch here.

    Anatomy -> Scores, Prices -> Plan -> model folder

`Unit`s are what interpretability talks about (a head, a neuron); `Segment`s are what is stored (a run of rows or
columns of one matrix); a `Group` is a set of segments that share one decision of the planner. The value of every score
and price is KL(original || changed) in nats per predicted token.
"""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from .files import write_bytes_atomic

Kind = Literal["head", "kv_group", "neuron", "expert", "feature", "layer"]
Axis = Literal["rows", "cols"]
DROP = "drop"
DENSE = "dense"
OUTER = -1
"""The layer of embedding and lm_head, which are outside the decoder blocks."""

_UNIT = re.compile(r"L(\d+)\.([a-z_]+)\.(\d+)")


@dataclass(frozen=True, order=True)
class UnitId:
    """One part of the model: `UnitId(12, "head", 7)` prints as `L12.head.7`; both numbers count from 0."""

    layer: int
    kind: Kind
    index: int

    def __str__(self) -> str:
        return f"L{self.layer}.{self.kind}.{self.index}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of `str`; ValueError names the text and the form that is expected."""
        match = _UNIT.fullmatch(text)
        if match is None or match[2] not in get_args(Kind):
            raise ValueError(f"{text!r} is not a unit: expected L<layer>.<{'|'.join(get_args(Kind))}>.<index>")
        return cls(int(match[1]), match[2], int(match[3]))  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Segment:
    """A run of rows or of columns of one matrix (a whole matrix is the run of all its rows).

    `start` and `stop` count rows (outputs) or columns (inputs) of the matrix; `rows` x `cols` is the segment's own
    shape.
    """

    module: str
    axis: Axis
    start: int
    stop: int
    rows: int
    cols: int

    @property
    def numel(self) -> int:
        """Number of weights in the segment."""
        return self.rows * self.cols

    def __str__(self) -> str:
        span = f"{self.start}:{self.stop}"
        return f"{self.module}[{span}, :]" if self.axis == "rows" else f"{self.module}[:, {span}]"


@dataclass(frozen=True)
class Group:
    """Segments of one decoder block that share one decision; `units` are the parts that the decision touches.

    `layer` is OUTER for embedding and lm_head; tied, they are one group, whose segment is the embedding's.
    """

    name: str
    layer: int
    segments: tuple[Segment, ...]
    units: tuple[UnitId, ...] = ()

    @property
    def numel(self) -> int:
        """Number of weights in all segments."""
        return sum(segment.numel for segment in self.segments)


@dataclass(frozen=True)
class Scores:
    """How much the model relies on each unit, by one method.

    `values[n]` are nats per predicted token that the model loses without unit n, `stderr[n]` their standard error over
    sequences. Scores of a behavior are metric(changed) - metric(clean), over its pairs: a unit that it needs is below
    zero, and `provenance["value"]` names the measure. `evidence` says what kind of claim that is: `causal` (an
    intervention was measured), `gradient` (an estimate from derivatives) or `correlational`. `provenance` holds model,
    data and settings.
    """

    method: str
    evidence: Literal["causal", "gradient", "correlational"]
    units: tuple[UnitId, ...]
    values: NDArray[np.float64]
    stderr: NDArray[np.float64]
    provenance: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes `path` (safetensors) and, beside it, the same name with .json."""
        meta = {
            "method": self.method,
            "evidence": self.evidence,
            "units": [str(unit) for unit in self.units],
            "provenance": self.provenance,
        }
        _save(path, {"values": self.values, "stderr": self.stderr}, meta)

    @classmethod
    def load(cls, path: Path) -> Self:
        """The inverse of `save`."""
        arrays, meta = _load(path)
        units = tuple(UnitId.parse(text) for text in meta.pop("units"))
        return cls(units=units, **arrays, **meta)


@dataclass(frozen=True)
class Prices:
    """What each group costs in each format: bytes and nats, n groups x f formats.

    `nbytes` are all stored bytes (codes, scales, zeros, indices). `nats` is the price on which plans are made, in nats
    per predicted token (per-token Fisher: 1/2 mean over tokens of (g . dY)^2); `nats_sequence` keeps the covariance
    between positions of one sequence; `stderr` is the standard error of `nats` over sequences. An option that is not on
    offer has `nats` = inf. `neuron_order[layer]`, where present, is the permutation of that layer's neurons under which
    the segments are contiguous. `provenance` holds model, data and settings. `original_numel` is the number of linear
    weights before pruning, None where nothing was pruned: groups hold only what is left.
    """

    groups: tuple[Group, ...]
    formats: tuple[str, ...]
    nbytes: NDArray[np.int64]
    nats: NDArray[np.float64]
    nats_sequence: NDArray[np.float64]
    stderr: NDArray[np.float64]
    neuron_order: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    original_numel: int | None = None

    @property
    def numel(self) -> NDArray[np.int64]:
        """Number of weights of each group [n]."""
        return np.array([group.numel for group in self.groups], dtype=np.int64)

    @property
    def is_linear(self) -> NDArray[np.bool_]:
        """Which groups [n] are linear weights of decoder blocks, and not embedding or lm_head."""
        return np.array([group.layer != OUTER for group in self.groups], dtype=np.bool_)

    @property
    def linear_numel(self) -> int:
        """Number of linear weights in decoder blocks before pruning: the denominator of bits per weight."""
        return self.original_numel or int(self.numel[self.is_linear].sum())

    def column(self, name: str) -> int:
        """The index of format `name`; KeyError names the ones there are."""
        if name not in self.formats:
            raise KeyError(f"format {name!r} was not priced: there are {', '.join(self.formats)}")
        return self.formats.index(name)

    def save(self, path: Path) -> None:
        """Writes `path` (safetensors) and, beside it, the same name with .json."""
        arrays = {name: getattr(self, name) for name in ("nbytes", "nats", "nats_sequence", "stderr")}
        arrays |= {f"neuron_order.{layer}": order for layer, order in self.neuron_order.items()}
        meta = {
            "formats": list(self.formats),
            "groups": [_group_to_json(group) for group in self.groups],
            "original_numel": self.original_numel,
            "provenance": self.provenance,
        }
        _save(path, arrays, meta)

    @classmethod
    def load(cls, path: Path) -> Self:
        """The inverse of `save`."""
        arrays, meta = _load(path)
        order = {int(name.split(".")[1]): arrays.pop(name) for name in list(arrays) if name.startswith("neuron_order.")}
        groups = tuple(_group_from_json(entry) for entry in meta["groups"])
        rest = {name: meta[name] for name in ("provenance", "original_numel")}
        return cls(groups, tuple(meta["formats"]), **arrays, neuron_order=order, **rest)


@dataclass(frozen=True)
class Decision:
    """One group and the format that the plan gives it, with the bytes and the price of that choice.

    `protected` says that the user forbade anything worse, not that the planner happened to like it.
    """

    group: Group
    format: str
    nbytes: int
    nats: float
    protected: bool = False


@dataclass(frozen=True)
class Plan:
    """The assignment of a format to every group, with what it is predicted to cost.

    `linear_bytes` are the bytes of all linear weights of the decoder blocks, `linear_numel` their number before
    compression (pruned weights stay in it), `other_bytes` those of everything else (embeddings, norms, lm_head).
    `outer` decides on embedding and lm_head, empty where nobody priced them: they stay as they are.
    `predicted_kl` is the sum of the prices, `predicted_kl_corrected` that sum through the curve fitted on probes
    (None if nothing was probed), `bound_kl` a lower bound on what any plan within the budget could be predicted to
    cost.
    """

    budget: str
    target: str
    decisions: tuple[Decision, ...]
    linear_bytes: int
    linear_numel: int
    other_bytes: int
    predicted_kl: float
    predicted_kl_corrected: float | None
    bound_kl: float
    neuron_order: dict[int, tuple[int, ...]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    outer: tuple[Decision, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """8 x linear_bytes / linear_numel."""
        return 8 * self.linear_bytes / self.linear_numel

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json: one line a decision, so that a diff of two plans reads well."""
        return {
            "schema": 1,
            "budget": self.budget,
            "target": self.target,
            "bits_per_weight": self.bits_per_weight,
            "linear_bytes": self.linear_bytes,
            "linear_numel": self.linear_numel,
            "other_bytes": self.other_bytes,
            "predicted_kl": self.predicted_kl,
            "predicted_kl_corrected": self.predicted_kl_corrected,
            "bound_kl": self.bound_kl,
            "provenance": self.provenance,
            "neuron_order": {str(layer): list(order) for layer, order in self.neuron_order.items()},
            "outer": [_decision_to_json(decision) for decision in self.outer],
            "decisions": [_decision_to_json(decision) for decision in self.decisions],
        }

    def save(self, path: Path) -> None:
        """Writes plan.json with one decision a line."""
        document = self.to_json()
        lists = [(name, [json.dumps(entry) for entry in document.pop(name)]) for name in ("outer", "decisions")]
        text = json.dumps(document, indent=1)[:-2]
        for name, entries in lists:
            text += f',\n "{name}": [' + (("\n  " + ",\n  ".join(entries) + "\n ]") if entries else "]")
        text += "\n}\n"
        write_bytes_atomic(path, text.encode())

    @classmethod
    def load(cls, path: Path) -> Self:
        """The inverse of `save`."""
        document = json.loads(path.read_text())
        decisions, outer = (
            tuple(
                Decision(_group_from_json(entry), entry["format"], entry["bytes"], entry["nats"], entry["protected"])
                for entry in document.get(key, [])
            )
            for key in ("decisions", "outer")
        )
        order = {int(layer): tuple(entry) for layer, entry in document["neuron_order"].items()}
        names = ("budget", "target", "linear_bytes", "linear_numel", "other_bytes", "predicted_kl")
        names += ("predicted_kl_corrected", "bound_kl", "provenance")
        rest = {name: document[name] for name in names}
        return cls(decisions=decisions, outer=outer, neuron_order=order, **rest)


@dataclass(frozen=True)
class Probe:
    """A whole plan whose additive prediction was frozen and whose KL was then measured, in nats per predicted token."""

    label: str
    bits_per_weight: float
    predicted_kl: float
    measured_kl: float


def _group_to_json(group: Group) -> dict[str, Any]:
    return {
        "group": group.name,
        "layer": group.layer,
        "segments": [asdict(segment) for segment in group.segments],
        "units": [str(unit) for unit in group.units],
    }


def _decision_to_json(decision: Decision) -> dict[str, Any]:
    return _group_to_json(decision.group) | {
        "format": decision.format,
        "bytes": decision.nbytes,
        "nats": decision.nats,
        "protected": decision.protected,
    }


def _group_from_json(entry: dict[str, Any]) -> Group:
    segments = tuple(Segment(**segment) for segment in entry["segments"])
    return Group(entry["group"], entry["layer"], segments, tuple(UnitId.parse(text) for text in entry["units"]))


def _save(path: Path, arrays: dict[str, NDArray[Any]], meta: dict[str, Any]) -> None:
    from safetensors.numpy import save

    # The json goes first: a reader takes the safetensors file as the sign that both are whole.
    write_bytes_atomic(path.with_suffix(".json"), (json.dumps(meta, indent=1) + "\n").encode())
    write_bytes_atomic(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def _load(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    from safetensors.numpy import load_file

    return load_file(path), json.loads(path.with_suffix(".json").read_text())
