"""A linear map whose weights were stored packed.

1. Built on the meta device from its descriptor, with the flat tensors of the stored form as buffers; transformers fills
   them in.
2. `repack` then turns them into what the device runs fast and drops the stored form, one matrix after the other, so
   that the model is never in memory twice:

   | device | compute type | matrix | runs as | bytes a weight |
   |---|---|---|---|---|
   | CPU | bfloat16 | 2 to 4 bits, one group size of 32 to 256 that divides cols | torch's int4pack | 0.5 + 4 / group |
   | CPU | bfloat16 | 5 to 8 bits, likewise (grid.py) | int4pack twice | 1 + 8 / group |
   | CUDA | bfloat16, float16 | every one | Triton (`circuitpress_kernels`) | as stored (slices.py) |
   | any | any | everything else | dense | 2 or 4 |

   float32 is always dense: those are exactly the numbers that were stored, for tests and for evaluation.

No gradient flows through int4pack or Triton; load in float32 to differentiate.
"""

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuitpress_kernels import SliceForm, SliceMatrix, has_triton, slice_linear, slice_weight

from ..errors import CircuitpressError
from . import int4pack
from .descriptor import Descriptor
from .grid import shared_group_size, to_grid
from .slices import Turned, to_slices

_HALVES = (torch.bfloat16, torch.float16)
_SLICES = SliceMatrix._fields[:-1]


class PackedLinear(nn.Module):
    """y = x W^T + b with W [out_features, in_features] stored as `descriptor` says.

    `form` is "stored" until `repack`, then "int4pack", "slices" (Triton) or "dense"; a stored module works too, but
    unpacks the whole matrix at every call.
    """

    def __init__(
        self,
        descriptor: Descriptor,
        *,
        bias: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.descriptor = descriptor
        self.out_features, self.in_features = descriptor.rows, descriptor.cols
        self.form = "stored"
        self.group_size = 0
        self.slices: SliceForm | None = None
        self.turned = Turned(())
        for name, (kind, count) in descriptor.layout().items():
            self.register_buffer(name, torch.empty(count, dtype=kind, device=device))
        self.bias = nn.Parameter(torch.empty(descriptor.rows, dtype=dtype, device=device)) if bias else None

    @property
    def stored(self) -> dict[str, Tensor]:
        """The flat tensors of the stored form; CircuitpressError after `repack`, which drops them."""
        if self.form != "stored":
            message = f"the stored weights were repacked as {self.form} and dropped"
            raise CircuitpressError(message, hint="read them from the checkpoint")
        return {name: self.get_buffer(name) for name in self.descriptor.layout()}

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """The weights [rows, cols] that the module multiplies with, in float32."""
        if self.form == "stored":
            return self.descriptor.decode(self.stored)
        if self.form == "slices":
            return self.turned.fold(slice_weight(self._matrix()), self.get_buffer("strips"))
        weight = self.get_buffer("weight")
        if self.form == "dense":
            return weight.float()
        return self._matmul(torch.eye(self.in_features, dtype=torch.bfloat16)).float().T.contiguous()

    @torch.no_grad()
    def repack(self, dtype: torch.dtype, *, slices: bool | None = None) -> None:
        """Turns the stored form into what the device computes with in `dtype`, and drops the stored form.

        With `slices` it is the kernels' on any device; on a CPU that is their specification, for tests.
        """
        stored = self.stored
        device = next(iter(stored.values())).device
        group_size = shared_group_size(self.descriptor)
        if slices is None:
            slices = device.type == "cuda" and has_triton()
        if slices and dtype in _HALVES:
            matrix, self.turned, strips = to_slices(self.descriptor, stored, dtype=dtype)
            form, self.slices = "slices", matrix.form
            buffers = dict(zip(_SLICES, matrix[:-1], strict=True)) | {"strips": strips}
        elif (
            device.type == "cpu"
            and dtype == torch.bfloat16
            and group_size in int4pack.GROUP_SIZES
            and self.in_features % group_size == 0
        ):
            form, buffers = "int4pack", self._int4pack(stored, group_size)
        else:
            form, buffers = "dense", {"weight": self.descriptor.decode(stored, dtype=dtype)}
        for name in stored:
            delattr(self, name)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)
        self.form, self.group_size = form, group_size or 0

    def _int4pack(self, stored: dict[str, Tensor], group_size: int) -> dict[str, Tensor]:
        grid = to_grid(self.descriptor, stored, group_size)
        packed = int4pack.pack(grid.lower, group_size=group_size)
        buffers = {"weight": packed.codes, "scales_and_zeros": packed.scales_and_zeros}
        if grid.upper is not None:
            upper = int4pack.pack(grid.upper, group_size=group_size)
            buffers |= {"upper": upper.codes, "upper_scales_and_zeros": upper.scales_and_zeros, "where": grid.where}
        return buffers

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if self.form == "dense":
            return F.linear(x, self.get_buffer("weight"), self.bias)
        if self.form == "stored":
            return F.linear(x, self.dequantize().to(x.dtype), self.bias)
        flat = x.flatten(0, -2) if x.dim() > 1 else x[None]
        if self.form == "slices":
            y = slice_linear(self.turned.extend(flat, self.get_buffer("strips")), self._matrix(), self.bias)
        else:
            y = self._matmul(flat) if self.bias is None else self._matmul(flat) + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def _matrix(self) -> SliceMatrix:
        assert self.slices is not None
        return SliceMatrix(*(self.get_buffer(name) for name in _SLICES), form=self.slices)

    def _matmul(self, x: Tensor) -> Tensor:
        """x W^T by int4pack, bfloat16."""
        x = x.bfloat16()
        y = self._plane(x, "weight", "scales_and_zeros", self.out_features)
        if not hasattr(self, "where"):
            return y
        where = self.get_buffer("where")
        if self.descriptor.axis == "rows":
            return y.index_add(1, where, self._plane(x, "upper", "upper_scales_and_zeros", len(where)))
        return y + self._plane(x[:, where], "upper", "upper_scales_and_zeros", self.out_features)

    def _plane(self, x: Tensor, codes: str, table: str, rows: int) -> Tensor:
        packed = int4pack.Packed(self.get_buffer(codes), self.get_buffer(table))
        return int4pack.matmul(x, packed, group_size=self.group_size, rows=rows)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves or casts the module, as `to` does; raises where a packed form would not survive that."""
        if self.form != "dense":
            refuse_cast(self, self.form, fn)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Shape, formats and form, for `print(model)`."""
        names = ", ".join(dict.fromkeys(part.format.name for part in self.descriptor.parts))
        return f"in_features={self.in_features}, out_features={self.out_features}, formats={names}, form={self.form}"


def refuse_cast(module: nn.Module, form: str, fn: Callable[[Tensor], Tensor]) -> None:
    """Raises CircuitpressError if `fn`, which `to` applies to all tensors, would spoil a module packed as `form`."""
    kinds = {buffer.dtype for buffer in module.buffers() if buffer.is_floating_point()}
    device = next(module.buffers()).device
    for kind in kinds:
        new = fn(torch.empty(0, dtype=kind, device=device))
        if new.dtype != kind or (form == "int4pack" and new.device.type != "cpu"):
            hint = "load it as it will run: from_pretrained(folder, device_map='cuda', dtype=torch.bfloat16)"
            here = f"weights packed for {device.type} ({form})"
            raise CircuitpressError(f"{here} cannot become {new.dtype} on {new.device}", hint=hint)


def packed_linears(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed modules of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
