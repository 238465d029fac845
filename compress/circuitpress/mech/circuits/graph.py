"""The graph of a transformer whose edges a circuit chooses among: who writes into the residual stream, who reads it.

- Senders: the embedding, every attention head, every MLP. Each adds its own part to the residual stream.
- Receivers: the q input of every head, the k and the v input of every key-value group, the input of every MLP, and the
  logits. Each reads the sum of all parts written before it, through its norm. Under grouped-query attention k and v are
  computed once for a group of heads, so that is how fine an edge can be: splitting them further would be a model that
  nobody runs.
- An edge (sender, receiver) exists where the sender writes before the receiver reads: an MLP reads the heads of its own
  block, a head does not.

The decomposition is Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021); edges to q, k and v
apart are those of Conmy et al. (arXiv 2304.14997). Names are units of the project where there is one: `L0.head.1`,
`L0.kv_group.0.k`; an MLP is `L0.mlp`. No torch here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ...anatomy import Anatomy

EMBED = "embed"
LOGITS = "logits"
Mask = NDArray[np.bool_]
"""bool [senders, receivers]: something said of every edge."""


@dataclass(frozen=True)
class Graph:
    """All edges of one model; `heads[i]` and `kv_heads[i]` are what block i has."""

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]

    @property
    def depth(self) -> int:
        """Number of decoder blocks."""
        return len(self.heads)

    @cached_property
    def senders(self) -> tuple[str, ...]:
        """The embedding, then the heads and the MLP of each block."""
        blocks = [[f"L{i}.head.{h}" for h in range(n)] + [f"L{i}.mlp"] for i, n in enumerate(self.heads)]
        return (EMBED, *(name for block in blocks for name in block))

    @cached_property
    def receivers(self) -> tuple[str, ...]:
        """For each block q of the heads, k and v of the groups and the MLP; the logits come last."""
        names: list[str] = []
        for i, (heads, groups) in enumerate(zip(self.heads, self.kv_heads, strict=True)):
            names += [f"L{i}.head.{h}.q" for h in range(heads)]
            names += [f"L{i}.kv_group.{g}.{part}" for part in "kv" for g in range(groups)]
            names.append(f"L{i}.mlp")
        return (*names, LOGITS)

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """What a circuit of nodes chooses among: all heads and MLPs. Embedding and logits belong to every circuit."""
        return self.senders[1:]

    @cached_property
    def edges(self) -> Mask:
        """Which edges exist."""
        mask = np.zeros((len(self.senders), len(self.receivers)), dtype=np.bool_)
        mask[0] = True
        for i in range(self.depth):
            start, after = self.receivers_of(i)[0], self.receivers_of(i)[-1] + 1
            mask[list(self.heads_of(i)), after - 1 :] = True
            mask[self.mlp_of(i), after:] = True
            mask[self.heads_of(i)[0] :, start : after - 1] = False
        return mask

    @cached_property
    def sender_index(self) -> dict[str, int]:
        """Row of a sender's name."""
        return {name: row for row, name in enumerate(self.senders)}

    @cached_property
    def receiver_index(self) -> dict[str, int]:
        """Column of a receiver's name."""
        return {name: column for column, name in enumerate(self.receivers)}

    def heads_of(self, layer: int) -> range:
        """The rows of the heads of a block."""
        start = 1 + sum(self.heads[:layer]) + layer
        return range(start, start + self.heads[layer])

    def mlp_of(self, layer: int) -> int:
        """The row of the MLP of a block."""
        return self.heads_of(layer).stop

    def receivers_of(self, layer: int) -> range:
        """The columns of a block: q of heads, k of groups, v of groups, MLP."""
        start = sum(h + 2 * g + 1 for h, g in zip(self.heads[:layer], self.kv_heads[:layer], strict=True))
        return range(start, start + self.heads[layer] + 2 * self.kv_heads[layer] + 1)

    @cached_property
    def owners(self) -> tuple[tuple[int, ...], ...]:
        """For each receiver the rows of the nodes that it is an input of: a group's k feeds all heads of the group."""
        result: list[tuple[int, ...]] = []
        for i, (heads, groups) in enumerate(zip(self.heads, self.kv_heads, strict=True)):
            rows, share = self.heads_of(i), heads // groups
            result += [(row,) for row in rows]
            result += [tuple(rows[g * share : (g + 1) * share]) for _ in "kv" for g in range(groups)]
            result.append((self.mlp_of(i),))
        return (*result, ())

    def edges_of_nodes(self, nodes: Iterable[str]) -> Mask:
        """All edges out of `nodes` and of the embedding: what stays when every other node is ablated."""
        mask = np.zeros_like(self.edges)
        rows = [0, *(self.sender_index[name] for name in nodes)]
        mask[rows] = self.edges[rows]
        return mask

    def mask(self, edges: Iterable[tuple[str, str]]) -> Mask:
        """The mask of a list of edges; KeyError for a name that is not of this graph, ValueError for no edge."""
        mask = np.zeros_like(self.edges)
        for sender, receiver in edges:
            mask[self.sender_index[sender], self.receiver_index[receiver]] = True
        if (stray := mask & ~self.edges).any():
            row, column = np.argwhere(stray)[0]
            raise ValueError(f"{self.senders[row]} does not write before {self.receivers[column]} reads")
        return mask

    def names(self, mask: Mask) -> tuple[tuple[str, str], ...]:
        """The edges of a mask as (sender, receiver), in the order of the graph."""
        return tuple((self.senders[row], self.receivers[column]) for row, column in np.argwhere(mask))

    def connected(self, mask: Mask) -> Mask:
        """The edges of `mask` that lie on a path from the embedding to the logits within it."""
        fed = np.zeros(len(self.senders), dtype=np.bool_)
        useful = fed.copy()
        fed[0] = True
        for column, owners in enumerate(self.owners):  # receivers come in the order of computing
            if (mask[:, column] & fed).any():
                fed[list(owners)] = True
        useful |= mask[:, -1]
        for column in reversed(range(len(self.owners) - 1)):
            if useful[list(self.owners[column])].any():
                useful |= mask[:, column]
        reads = np.array([not owners or bool((useful & fed)[list(owners)].any()) for owners in self.owners])
        return mask & (fed & useful)[:, None] & reads[None]

    def nodes_of(self, mask: Mask) -> tuple[str, ...]:
        """The nodes that a set of edges joins: they send one of its edges, the embedding and the logits left out."""
        return tuple(name for row, name in enumerate(self.senders) if row and mask[row].any())


def graph_of(anatomy: Anatomy) -> Graph:
    """The graph of a model."""
    return Graph(tuple(block.heads for block in anatomy.blocks), tuple(block.kv_heads for block in anatomy.blocks))


def layer_of(node: str) -> int:
    """The block of a node `L3.head.1` or `L3.mlp`."""
    return int(node[1:].split(".")[0])


def heads_by_layer(nodes: Sequence[str]) -> dict[int, tuple[str, ...]]:
    """The heads among `nodes`, by block."""
    result: dict[int, tuple[str, ...]] = {}
    for node in nodes:
        if ".head." in node:
            result[layer_of(node)] = (*result.get(layer_of(node), ()), node)
    return result
