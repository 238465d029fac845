"""What heads could do by their weights alone: OV and QK circuits, copying, and composition between layers.

Head h of a layer reads v = W_V n, q = W_Q n, k = W_K n of the normed stream n and writes W_O v (Elhage et al., 2021,
"A Mathematical Framework for Transformer Circuits"). With the gain of the block's input norm folded into W_Q, W_K, W_V
(and the mean removed where the norm is a LayerNorm), and with query head h reading key-value head h // (H / KV):

    OV = W_O W_V  [d, d]      QK = W_Q^T W_K  [d, d]      both of rank head_dim, kept as two thin factors
    spectrum      singular values, from the small core of two QR decompositions
    effective     (sum s)^2 / sum s^2: how many directions the head really uses
    copying       sum of eigenvalues / sum of their absolute values of W_U OV W_E: +1 writes the token it reads
    composition   |QK OV'| / (|QK| |OV'|) for K and, with QK^T, for Q; |OV OV'| / (|OV| |OV'|) for V (Frobenius), OV'
                  of an earlier layer; two random heads give about 1 / sqrt(d)

Evidence: correlational. Weights say what a head could read; positions (rotary tables turn q and k with distance; norms
on q and k rescale them) and the activations that occur decide what it does. Composition ignores the norm's scale.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...anatomy import Block
from ...console import Advance, ignore
from ...hooks import weight_of
from ...stream import Stream


class Thin(NamedTuple):
    """A matrix left @ right, [d, r] times [r, d], with the Gram matrices [r, r] of both sides."""

    left: Tensor
    right: Tensor
    left_gram: Tensor
    right_gram: Tensor

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> Self:
        """From the two factors."""
        return cls(left, right, left.T @ left, right @ right.T)

    @property
    def transposed(self) -> "Thin":
        """Its transpose."""
        return Thin(self.right.T, self.left.T, self.right_gram, self.left_gram)

    @property
    def norm(self) -> float:
        """Its Frobenius norm: |L R|^2 = tr(L'L R R')."""
        return max(0.0, float((self.left_gram * self.right_gram).sum())) ** 0.5


@dataclass(frozen=True)
class HeadWeights:
    """One head: singular values of OV and QK [head_dim], largest first, and its copying score."""

    layer: int
    head: int
    ov: NDArray[np.float64]
    qk: NDArray[np.float64]
    copying: float

    @staticmethod
    def effective(singular: NDArray[np.float64]) -> float:
        """(sum s)^2 / sum s^2: between 1 and the number of singular values; 0 for a head without weights."""
        square = float((singular**2).sum())
        return float(singular.sum()) ** 2 / square if square else 0.0


@dataclass(frozen=True)
class Composition:
    """How strongly `reader` reads through its q, k or v what `writer` (of an earlier layer) writes."""

    writer: tuple[int, int]
    reader: tuple[int, int]
    q: float
    k: float
    v: float


@dataclass(frozen=True)
class Spectra:
    """All heads, and all pairs of heads of different layers."""

    heads: list[HeadWeights] = field(default_factory=list)
    pairs: list[Composition] = field(default_factory=list)


@torch.no_grad()
def spectra(stream: Stream, *, advance: Advance = ignore) -> Spectra:
    """Reads every block once; earlier layers' OV factors [d, head_dim] stay in memory, two a head."""
    embed = stream.outer_weight(stream.anatomy.outer[0].module).double().cpu()
    unembed = stream.outer_weight(stream.anatomy.outer[-1].module).double().cpu()
    inner = embed.T @ unembed  # [d, d], so that no vocabulary-sized product is kept
    found, earlier = Spectra(), list[tuple[tuple[int, int], Thin]]()
    for index in range(stream.depth):
        with stream.block(index) as module:
            circuits = list(_circuits(module, stream.anatomy.blocks[index]))
        for head, (ov, qk) in enumerate(circuits):
            # The eigenvalues of W_U OV W_E other than zero are those of the core [head_dim, head_dim].
            values = torch.linalg.eigvals(ov.right @ inner @ ov.left)
            total = float(values.abs().sum())
            copying = float(values.real.sum()) / total if total else 0.0
            found.heads.append(HeadWeights(index, head, _singular(ov), _singular(qk), copying))
            for writer, before in earlier:
                found.pairs.append(
                    Composition(
                        writer, (index, head), _composed(qk.transposed, before), _composed(qk, before),
                        _composed(ov, before),
                    )
                )  # fmt: skip
        earlier += [((index, head), ov) for head, (ov, _) in enumerate(circuits)]
        advance(1, f"block {index}")
    return found


def _circuits(module: nn.Module, block: Block) -> Iterator[tuple[Thin, Thin]]:
    """OV and QK of every query head, in float64."""
    q, k, v = (_rows(module, block, role) for role in ("q", "k", "v"))
    o = weight_of(module, block, block.role("o")).double().cpu()
    q, k, v = (_fold(module, weight) for weight in (q, k, v))
    group = block.heads // block.kv_heads
    for head in range(block.heads):
        own, shared = (slice(i * block.head_dim, (i + 1) * block.head_dim) for i in (head, head // group))
        yield Thin.of(o[:, own], v[shared]), Thin.of(q[own].T, k[shared])


def _rows(module: nn.Module, block: Block, role: str) -> Tensor:
    """The weights [rows, d] of q, k or v, cut out of a fused matrix where there is one."""
    if any(matrix.role == "qkv" for matrix in block.matrices):
        whole = weight_of(module, block, block.role("qkv"))
        size = whole.shape[0] // 3
        at = "qkv".index(role) * size
        return whole[at : at + size].double().cpu()
    return weight_of(module, block, block.role(role)).double().cpu()


def _fold(module: nn.Module, weight: Tensor) -> Tensor:
    """Takes the gain of the block's input norm into weights [rows, d], and the mean out where it is a LayerNorm."""
    norm = next(child for child in module.children() if getattr(child, "weight", None) is not None and _is_norm(child))
    gain = norm.weight
    assert isinstance(gain, Tensor)
    folded = weight * gain.detach().double().cpu()
    return folded - folded.mean(1, keepdim=True) if isinstance(norm, nn.LayerNorm) else folded


def _is_norm(module: nn.Module) -> bool:
    weight = module.weight
    return isinstance(weight, Tensor) and weight.dim() == 1


def _singular(matrix: Thin) -> NDArray[np.float64]:
    """Singular values of left @ right, from the product of the triangles of two QR decompositions."""
    core = torch.linalg.qr(matrix.left)[1] @ torch.linalg.qr(matrix.right.T)[1].T
    return torch.linalg.svdvals(core).numpy()


def _composed(reader: Thin, writer: Thin) -> float:
    """|reader writer| / (|reader| |writer|), where the right side of `reader` reads what `writer` wrote.

    Through the Gram matrices a pair costs one product [r, d] [d, r], and nothing of size d x d.
    """
    middle = reader.right @ writer.left
    square = float(((reader.left_gram @ middle) * (middle @ writer.right_gram)).sum())
    below = reader.norm * writer.norm
    return max(0.0, square) ** 0.5 / below if below else 0.0
