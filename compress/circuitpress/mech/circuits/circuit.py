"""The value that circuit discovery returns: which nodes and edges, how they were chosen, on what evidence.

`circuit.json` holds all of it, with the scores of everything that was *not* chosen too: a ranking is what CPR and CMD
are measured over, and what a second look at a cut needs. No torch here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from ...errors import CircuitpressError
from ...files import write_bytes_atomic
from ...units import UnitId
from .graph import Graph, Mask, layer_of

Granularity = Literal["nodes", "edges"]
Edge = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Circuit:
    """A part of a model that is claimed to do a behavior; embedding and logits belong to it without being named.

    `nodes` and `edges` are names of `graph`; a circuit of nodes has all edges out of them. `scores` [k] are those of
    `graph.nodes` or of all edges in the order of `graph.names(graph.edges)`: estimates of m(ablated) - m(clean), below
    zero where the part helps. `edge_scores` [k] are those of all edges, for drawing, where they were computed.
    `necessity` is by node or edge (as "sender>receiver") what ablating it within the circuit takes from faithfulness,
    measured. `evidence` is what backs the choice: causal once the units near the cut were ablated, else gradient.
    """

    graph: Graph
    granularity: Granularity
    nodes: tuple[str, ...]
    edges: tuple[Edge, ...]
    scores: NDArray[np.float64]
    order: NDArray[np.int64]
    faithfulness: float
    method: str
    evidence: Literal["causal", "gradient"]
    necessity: Mapping[str, float] = field(default_factory=dict)
    edge_scores: NDArray[np.float64] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> Mask:
        """The edges that are not ablated when the circuit is left alone."""
        return self.graph.edges_of_nodes(self.nodes) if self.granularity == "nodes" else self.graph.mask(self.edges)

    @property
    def size(self) -> int:
        """Number of nodes, or of edges in a circuit of edges."""
        return len(self.nodes) if self.granularity == "nodes" else len(self.edges)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The nodes as `plan.protect` takes them: heads as units, an MLP as all of its neurons."""
        return tuple(f"L{layer_of(node)}.neuron.*" if node.endswith(".mlp") else node for node in self.nodes)

    def units(self, neurons: Mapping[int, int]) -> tuple[UnitId, ...]:
        """The nodes as units; `neurons` says how many neurons the MLP of each layer has."""
        result: list[UnitId] = []
        for node in self.nodes:
            layer = layer_of(node)
            mlp = node.endswith(".mlp")
            result += [UnitId(layer, "neuron", i) for i in range(neurons[layer])] if mlp else [UnitId.parse(node)]
        return tuple(result)

    def scored_edges(self) -> dict[Edge, float]:
        """The scores of all edges of the graph by name; empty where edges were not scored."""
        if self.edge_scores is None:
            return {}
        return dict(zip(self.graph.names(self.graph.edges), self.edge_scores.tolist(), strict=True))

    def to_json(self) -> dict[str, Any]:
        """The content of circuit.json."""
        values = dict(zip(self.graph.nodes, self.scores.tolist(), strict=False)) if self.granularity == "nodes" else {}
        nodes = [{"node": n, "score": values.get(n), "necessity": self.necessity.get(n)} for n in self.nodes]
        known = self.scored_edges()
        edges = [
            {"from": s, "to": r, "score": known.get((s, r)), "necessity": self.necessity.get(f"{s}>{r}")}
            for s, r in self.edges
        ]
        return {
            "schema": 1,
            "granularity": self.granularity,
            "method": self.method,
            "evidence": self.evidence,
            "faithfulness": self.faithfulness,
            "size": self.size,
            "of": len(self.scores),
            "protect": list(self.patterns),
            "nodes": nodes,
            "edges": edges,
            "provenance": dict(self.provenance),
            "graph": {"heads": list(self.graph.heads), "kv_heads": list(self.graph.kv_heads)},
            "order": self.order.tolist(),
            "scores": self.scores.tolist(),
            "edge_scores": None if self.edge_scores is None else self.edge_scores.tolist(),
        }

    def save(self, path: Path) -> None:
        """Writes circuit.json: readable above, and the long lists one a line at the end."""
        document = self.to_json()
        lists = {name: json.dumps(document.pop(name)) for name in ("nodes", "edges", "order", "scores", "edge_scores")}
        text = json.dumps(document, indent=1)[:-2]
        for name, line in lists.items():
            text += f',\n "{name}": ' + line.replace("}, {", "},\n  {")
        text += "\n}\n"
        write_bytes_atomic(path, text.encode())

    @classmethod
    def load(cls, path: Path) -> Self:
        """The inverse of `save`; CircuitpressError for a file that is no circuit."""
        try:
            document = json.loads(path.read_text())
            graph = Graph(*(tuple(document["graph"][name]) for name in ("heads", "kv_heads")))
            edges, nodes = document["edges"], document["nodes"]
            necessity = {f"{e['from']}>{e['to']}": e["necessity"] for e in edges}
            necessity |= {n["node"]: n["necessity"] for n in nodes}
            drawn = document["edge_scores"]
            return cls(
                graph,
                document["granularity"],
                tuple(node["node"] for node in nodes),
                tuple((edge["from"], edge["to"]) for edge in edges),
                np.array(document["scores"], dtype=np.float64),
                np.array(document["order"], dtype=np.int64),
                document["faithfulness"],
                document["method"],
                document["evidence"],
                {name: value for name, value in necessity.items() if value is not None},
                None if drawn is None else np.array(drawn, dtype=np.float64),
                document["provenance"],
            )
        except OSError as error:
            raise CircuitpressError(
                f"cannot read the circuit {path}: {error.strerror}", hint="make one: circuitpress circuit find --help"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise CircuitpressError(
                f"{path} is not a circuit: {type(error).__name__}: {error}",
                hint="pass the circuit.json that `circuitpress circuit find` wrote",
            ) from error
