"""An embedding whose rows were stored packed, and the lm_head that is tied to it.

Rows are looked up, a few at a time, so they stay packed in memory and only the rows that are asked for are decoded:

| stored | runs as | bytes a weight |
|---|---|---|
| one integer format whose rows are whole bytes | rows | bits / 8 + 3 / group |
| anything else | dense | 2 or 4 |

A tied lm_head multiplies with the same matrix. It is a `PackedLinear` over the same flat tensors, which it repacks for
its own product. Where that form is dense the embedding looks up in it and drops its own; otherwise both are kept, at
int4 a byte a weight together where a dense matrix would take 2 or 4.
"""

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CircuitpressError
from ..formats import IntCodes, IntFormat
from ..formats.base import pack_bits, unpack_bits
from .descriptor import Descriptor
from .linear import PackedLinear, refuse_cast


class PackedEmbedding(nn.Module):
    """ids [...] -> rows [..., cols] of a matrix [rows, cols] stored as `descriptor` says, in the type of `repack`.

    `form` is "stored" until `repack`, then "rows" or "dense".
    """

    def __init__(self, descriptor: Descriptor, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.descriptor = descriptor
        self.num_embeddings, self.embedding_dim = descriptor.rows, descriptor.cols
        self.form = "stored"
        self.dtype = torch.float32
        for name, (kind, count) in descriptor.layout().items():
            self.register_buffer(name, torch.empty(count, dtype=kind, device=device))

    @property
    def stored(self) -> dict[str, Tensor]:
        """The flat tensors of the stored form; CircuitpressError after `repack`, which drops them."""
        if self.form != "stored":
            message = f"the stored weights were repacked as {self.form} and dropped"
            raise CircuitpressError(message, hint="read them from the checkpoint")
        return {name: self.get_buffer(name) for name in self.descriptor.layout()}

    @torch.no_grad()
    def repack(self, dtype: torch.dtype, *, head: PackedLinear | None = None) -> None:
        """Turns the stored form into what is looked up in, for rows of `dtype`; `head`: the tied lm_head, repacked."""
        stored, form = self.stored, self._row_format()
        if head is not None and head.form == "dense":
            buffers = {"weight": head.get_buffer("weight")}
        elif form is not None:
            value = form.unpack(stored, self.num_embeddings, self.embedding_dim)
            codes = pack_bits(value.codes, form.bits).view(self.num_embeddings, -1)
            buffers = {"weight": codes, "scales": value.scales, "zeros": value.zeros}
        else:
            buffers = {"weight": self.descriptor.decode(stored, dtype=dtype)}
        for name in stored:
            delattr(self, name)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)
        self.form, self.dtype = ("dense" if len(buffers) == 1 else "rows"), dtype

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., embedding_dim]."""
        if self.form == "stored":
            return F.embedding(ids, self.descriptor.decode(self.stored, dtype=self.dtype))
        weight = self.get_buffer("weight")
        if self.form == "dense":
            return F.embedding(ids, weight)
        form = self._row_format()
        assert form is not None
        flat = ids.reshape(-1)
        codes = unpack_bits(weight[flat].reshape(-1), form.bits, (flat.numel(), self.embedding_dim))
        scales, zeros = self.get_buffer("scales")[flat], self.get_buffer("zeros")[flat]
        return form.decode(IntCodes(codes, scales, zeros)).to(self.dtype).view(*ids.shape, self.embedding_dim)

    def _row_format(self) -> IntFormat | None:
        """The format if it is one for all rows and its rows are whole bytes."""
        parts = self.descriptor.parts
        form = parts[0].format
        whole = len(parts) == 1 and isinstance(form, IntFormat) and self.embedding_dim * form.bits % 8 == 0
        return form if whole and isinstance(form, IntFormat) else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves or casts the module, as `to` does; raises where a packed form would not survive that."""
        if self.form != "dense":
            refuse_cast(self, self.form, fn)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Shape, formats and form, for `print(model)`."""
        names = ", ".join(dict.fromkeys(part.format.name for part in self.descriptor.parts))
        return f"{self.num_embeddings}, {self.embedding_dim}, formats={names}, form={self.form}"


def tied_head(descriptor: Descriptor) -> PackedLinear:
    """An lm_head without tensors of its own, for `share` to fill: a checkpoint stores the matrix once."""
    head = PackedLinear(descriptor, bias=False, device="meta")
    for name in head.stored:
        delattr(head, name)
    return head


def share(embedding: PackedEmbedding, head: PackedLinear) -> None:
    """Gives `head` (from `tied_head`) the flat tensors of `embedding`; no bytes are copied."""
    for name, buffer in embedding.stored.items():
        head.register_buffer(name, buffer)


def packed_embeddings(model: nn.Module) -> dict[str, PackedEmbedding]:
    """The packed embeddings of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedEmbedding)}
