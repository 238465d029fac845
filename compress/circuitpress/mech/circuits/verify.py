"""Checks the claim that a circuit makes, by ablation alone. Evidence: causal.

- faithfulness f(C), with a bootstrap interval over prompts: does the circuit alone do what the model does?
- completeness: what the model still does without the circuit, f(M without C), should be nothing; and whatever part K of
  it is missing, circuit and model should lose the same, |f(C without K) - f(M without K)| (Wang et al.,
  arXiv 2211.00593, over random K).
- minimality: what faithfulness loses without each unit of the circuit. Heads of one block that stand in for one another
  each lose little, so a head is also taken away after the others of its block.
- random circuits of the same size, all of them where there are few: a large circuit of anything is faithful.
- CPR and CMD: the areas under f and under |1 - f| over the sizes of circuits along the ranking (Mueller et al.,
  arXiv 2504.13151); larger and smaller is better.
- groups: heads of a block ablated together in the whole model, against the sum of their single effects.

Which of these a circuit passes depends on the ablation and on the granularity (Miller et al., arXiv 2407.08734): the
result says both.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...behaviors import Behavior
from ...console import Advance, ignore
from ...errors import CircuitpressError
from ...files import write_bytes_atomic
from ...stream import Stream
from .checks import (
    Curve,
    Faithfulness,
    Group,
    Need,
    Random,
    Subset,
    Units,
    at_random,
    completeness,
    curve,
    faithfulness,
    groups,
    minimality,
)
from .circuit import Circuit, Granularity
from .graph import graph_of
from .parts import Ablation
from .rig import open_rig


@dataclass(frozen=True)
class Verification:
    """What ablation says about a circuit of `size` out of `total` nodes or edges.

    `whole` and `empty` are the metric of the model and with everything ablated; all else is in shares of their
    difference. `completeness` begins with the whole circuit as the missing part.
    """

    behavior: str
    metric: str
    ablation: Ablation
    granularity: Granularity
    pairs: int
    size: int
    total: int
    whole: float
    empty: float
    faithfulness: Faithfulness
    completeness: tuple[Subset, ...]
    minimality: tuple[Need, ...]
    random: Random
    curve: Curve
    groups: tuple[Group, ...]
    evidence: Literal["causal"] = "causal"
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of verify.json."""
        document: dict[str, Any] = {"schema": 1} | asdict(self)
        for entry, subset in zip(document["completeness"], self.completeness, strict=True):
            entry["gap"] = subset.gap
        for entry, group in zip(document["groups"], self.groups, strict=True):
            entry["redundant"] = group.redundant
        return document

    def save(self, path: Path) -> None:
        """Writes verify.json."""
        write_bytes_atomic(path, (json.dumps(self.to_json(), indent=1) + "\n").encode())


def verify_circuit(
    stream: Stream, behavior: Behavior, circuit: Circuit, *, ablation: Ablation = "resample", random: int = 100,
    subsets: int = 10, seed: int = 0, advance: Advance = ignore,
) -> Verification:  # fmt: skip
    """Measures every check of the module on the pairs of `behavior`, which need not be those the circuit comes from.

    `random` circuits and `subsets` of the circuit are drawn. CircuitpressError if the circuit is of a model with other
    heads, is empty, or the model does not do the behavior.
    """
    units = _units(stream, circuit)
    with open_rig(stream, behavior, ablation) as rig:
        full = faithfulness(rig, units, seed=seed)
        return Verification(
            behavior.name, behavior.metric, ablation, circuit.granularity, len(behavior), circuit.size,
            len(units.every), float(rig.whole.mean()), float(rig.empty.mean()), full,
            completeness(rig, units, count=subsets, seed=seed, advance=advance),
            minimality(rig, units, advance=advance),
            at_random(rig, units, full.value, count=random, seed=seed, advance=advance),
            curve(rig, units, circuit.order, advance=advance),
            groups(rig, circuit.nodes, advance=advance),
            provenance={
                "model": str(stream.anatomy.folder), "circuit": dict(circuit.provenance), "method": circuit.method,
                "prompts": behavior.provenance, "seed": seed,
            },
        )  # fmt: skip


@dataclass(frozen=True)
class Standing:
    """The two claims of a circuit in one model: faithfulness of the circuit alone, and what is left without it.

    `whole` and `empty` are the metric of the model and with everything ablated, `left` is f(M without C).
    """

    whole: float
    empty: float
    faithfulness: Faithfulness
    left: float
    evidence: Literal["causal"] = "causal"


def stand(
    stream: Stream, behavior: Behavior, circuit: Circuit, *, ablation: Ablation = "resample", seed: int = 0
) -> Standing:
    """Faithfulness and completeness alone, as `verify_circuit` measures them; raises as that does.

    This is what there is to ask again of a circuit that was verified in another model, such as the uncompressed one.
    """
    units = _units(stream, circuit)
    with open_rig(stream, behavior, ablation) as rig:
        full = faithfulness(rig, units, seed=seed)
        (without,) = completeness(rig, units, count=0, seed=seed)
        return Standing(float(rig.whole.mean()), float(rig.empty.mean()), full, without.model)


def _units(stream: Stream, circuit: Circuit) -> Units:
    """The circuit's units, if this model has them."""
    if circuit.graph != graph_of(stream.anatomy):
        raise CircuitpressError(
            f"the circuit is of a model with {list(circuit.graph.heads)} heads in its blocks, {stream.anatomy.folder} "
            f"has {[block.heads for block in stream.anatomy.blocks]}",
            hint="verify it on the model it was found in, or on one with the same parts",
        )
    if not circuit.size:
        raise CircuitpressError("the circuit has no parts", hint="find one with a larger --size or --faithfulness")
    return Units.of(circuit)
