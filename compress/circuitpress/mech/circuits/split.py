"""Runs one resident block with an input of its own for every receiver, on transformers' own modules.

1. The block is called with the residual stream that most receivers read. Where a head's q, a group's k or v shall read
   another one, the output of that projection is recomputed for its rows alone, norm(x) W[rows]^T + b, and put in its
   place: everything after it (norms of q and k, rotary embedding, masks, the attention kernel) is the model's own code.
2. The input z of `o` (the heads' outputs, side by side) is recorded, then optionally rewritten: that is how a head's
   part of the stream is exchanged.
3. What the norm of the MLP gets is replaced by what the caller returns, who sees z and the stream so far.

In place of the hooks of one linear map (`hooks.gate`), these must see the block between attention and MLP.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ...anatomy import Block
from ...errors import CheckpointError
from ...hooks import weight_of
from ...stream import Stream

Part = Literal["q", "k", "v"]
Slot = tuple[Part, int]
"""One attention receiver of a block: ("q", head), ("k", group) or ("v", group)."""

_NORMS = {"attention": ("input_layernorm", "ln_1"), "mlp": ("post_attention_layernorm", "ln_2")}


class Pieces(NamedTuple):
    """What a block computed: z [batch, length, heads * head_dim], `middle` (the stream after attention) and `mlp`, both
    [batch, length, hidden]. The block's output is middle + mlp."""

    z: Tensor
    middle: Tensor
    mlp: Tensor


@dataclass(frozen=True)
class Split:
    """One resident block, ready to be run with inputs of its own for some receivers."""

    stream: Stream
    module: nn.Module
    place: Block

    def run(
        self,
        hidden: Tensor,
        *,
        attention: Mapping[Slot, Tensor] | None = None,
        z: Callable[[Tensor], Tensor] | None = None,
        mlp: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Pieces:
        """Runs the block on `hidden` [batch, length, hidden].

        `attention` gives single receivers another stream to read, of the shape of `hidden`; `z` rewrites the heads'
        outputs before they enter the stream; `mlp(z, middle)` returns the stream that the MLP reads.
        """
        seen: dict[str, Tensor] = {}

        def before_o(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen["z"] = args[0]
            return args if z is None else (z(args[0]), *args[1:])

        def before_norm(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen["middle"] = args[0]
            return args if mlp is None else (mlp(seen["z"], args[0]), *args[1:])

        def after_down(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            seen["mlp"] = output

        modules = {role: self._get(self.place.local(self.place.role(role))) for role in ("o", "down")}
        norm = self._norm("mlp")
        handles = [
            modules["o"].register_forward_pre_hook(before_o),
            norm.register_forward_pre_hook(before_norm),
            modules["down"].register_forward_hook(after_down),
        ]
        try:
            with self._rewritten(attention or {}):
                self.stream.run(self.place.index, self.module, hidden)
        finally:
            for handle in handles:
                handle.remove()
        return Pieces(seen["z"], seen["middle"], seen["mlp"])

    def write(self, z: Tensor) -> Tensor:
        """The parts [..., heads, hidden] that heads with outputs z [..., heads * head_dim] add to the stream."""
        weight = self.output_weight()
        return torch.einsum("...hk,dhk->...hd", z.unflatten(-1, (self.place.heads, -1)), weight)

    def output_weight(self) -> Tensor:
        """W_O as [hidden, heads, head_dim]."""
        return weight_of(self.module, self.place, self.place.role("o")).unflatten(1, (self.place.heads, -1))

    @contextlib.contextmanager
    def _rewritten(self, attention: Mapping[Slot, Tensor]) -> Iterator[None]:
        """While the context lasts, the projections of the receivers in `attention` read the streams given there."""
        chosen: dict[str, list[tuple[slice, Tensor]]] = {}
        for slot, hidden in attention.items():
            name, rows = self._rows(slot)
            chosen.setdefault(name, []).append((rows, hidden))
        handles = [
            self._get(name).register_forward_hook(self._projection(name, entries)) for name, entries in chosen.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _projection(self, name: str, entries: list[tuple[slice, Tensor]]) -> Callable[..., Tensor]:
        matrix = next(matrix for matrix in self.place.matrices if self.place.local(matrix) == name)
        norm, linear = self._norm("attention"), self._get(name)
        entries = sorted(entries, key=lambda entry: entry[0].start)

        def after(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
            weight, bias, pieces, at = weight_of(self.module, self.place, matrix), linear.bias, [], 0
            for rows, hidden in entries:
                own = None if bias is None else bias[rows]  # pyright: ignore
                pieces += [output[..., at : rows.start], nn.functional.linear(norm(hidden), weight[rows], own)]  # pyright: ignore[reportArgumentType]
                at = rows.stop
            return torch.cat([*pieces, output[..., at:]], dim=-1)

        return after

    def _rows(self, slot: Slot) -> tuple[str, slice]:
        """The module that computes a receiver, and the rows of its output that are the receiver's."""
        part, index = slot
        block, offset = self.place, 0
        roles = {matrix.role for matrix in block.matrices}
        if "qkv" in roles:
            offset = {"q": 0, "k": block.heads, "v": block.heads + block.kv_heads}[part]
        start = (offset + index) * block.head_dim
        return block.local(block.role("qkv" if "qkv" in roles else part)), slice(start, start + block.head_dim)

    def _norm(self, which: str) -> nn.Module:
        for name in _NORMS[which]:
            if hasattr(self.module, name):
                return self._get(name)
        raise CheckpointError(
            f"{self.place.prefix}: the norm before the {which} is none of {', '.join(_NORMS[which])}",
            hint="circuits are supported for pre-norm blocks of Llama's and GPT-2's kind",
        )

    def _get(self, name: str) -> Any:
        return self.module.get_submodule(name)
