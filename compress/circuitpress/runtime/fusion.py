"""Decoder layers of a packed model in few launches: norms, gates and residuals go into the products they stand beside.

| launches | unfused | fused |
|---|---|---|
| norm, q, k, v | norm (about 6) + 3 x 2 | 3 |
| o and the residual | 2 + 1 | 2 |
| norm, gate, up, SwiGLU | norm + 2 x 2 + 2 | 3 |
| down and the residual | 2 + 1 | 2 |

1. `fuse_layers` joins q, k and v, and gate and up, into one matrix each before they are laid out for the kernels; what
   was a module becomes a `Share`, which hands out its rows of the joined product.
2. The layer's forward then passes activations that are not normalised: `Joined` normalises them in its first launch;
   o and down add the residual in their last. Attention itself stays transformers' own.
3. `set_fusion(model, False)` goes back to the layer's own forward: the same numbers but for the rounding between steps.

Only layers whose forward is known are touched: those of Llama, Mistral, Qwen2 and Qwen3, with all matrices packed along
rows, on a GPU with Triton, in float16 or bfloat16. Hooks on a layer's norms and on its `mlp` are not called when fused.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from circuitpress_kernels import SliceMatrix, has_triton
from circuitpress_kernels.fused import Around, Turn, fused_linear, places_of

from ..formats.trellis import input_basis
from .descriptor import Descriptor, Part
from .linear import PackedLinear

FAMILIES = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""Layers that are: norm, attention, add, norm, mlp, add."""
_HALVES = (torch.bfloat16, torch.float16)


class FusedLinear(PackedLinear):
    """A packed linear map with what stands around it; `form` is "slices"."""

    block = 0
    """Of the rotation that the kernel makes; 0 where torch makes it."""

    def repack(self, dtype: torch.dtype, *, slices: bool | None = None) -> None:
        """As PackedLinear does, always for the kernels, and with the tables that these need."""
        super().repack(dtype, slices=slices is None or slices)
        self.register_buffer("places", places_of(self._matrix()))
        bases = [(start, *input_basis(stop - start)) for start, stop in self.turned.spans]
        blocks = {block for _, _, block in bases}
        if len(blocks) == 1 and (block := blocks.pop()).odd == 1 and block.power >= 32:
            strips = self.get_buffer("strips")
            sources = [torch.arange(start, start + len(sign)) for start, sign, _ in bases]
            factors = torch.stack([torch.cat([sign for _, sign, _ in bases]).to(strips.device), strips])
            self.register_buffer("sources", torch.cat(sources).int().to(strips.device))
            self.register_buffer("factors", factors)
            self.block = block.power

    def forward(
        self, x: Tensor, *, norm: nn.Module | None = None, residual: Tensor | None = None, gated: bool = False
    ) -> Tensor:
        """[..., in_features] to [..., out_features], half of them if `gated`; `norm` is an RMSNorm."""
        flat, turn = x.flatten(0, -2), None
        if self.block:
            turn = Turn(self.get_buffer("sources"), self.get_buffer("factors"), self.block)
        elif self.turned.spans:
            flat = self.turned.extend(flat if norm is None else norm(flat), self.get_buffer("strips"))
            norm = None
        gain, eps = (None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon)
        if residual is not None:
            residual = residual.reshape(-1, self.out_features)
        around = Around(gain, eps, turn, self.bias, residual, gated)  # pyright: ignore[reportArgumentType]
        y = fused_linear(flat, self._matrix(), self.get_buffer("places"), around)
        return y.view(*x.shape[:-1], -1)

    def _matrix(self) -> SliceMatrix:
        assert self.form == "slices"
        return super()._matrix()


class Joined(nn.Module):
    """Several maps of the same input as one; with `norm` it takes activations that are not normalised."""

    def __init__(self, linear: FusedLinear, sizes: Sequence[int]) -> None:
        super().__init__()
        self.linear = linear
        self.sizes = tuple(sizes)
        self.norm: list[nn.Module] = []  # in a list, so that its weights are not listed twice
        self.active = False
        self.source: Tensor | None = None
        self.left: dict[int, Tensor] = {}

    def forward(self, x: Tensor, *, gated: bool = False) -> Tensor:
        """The joined product."""
        return self.linear(x, norm=self.norm[0] if self.active else None, gated=gated)

    def take(self, x: Tensor, index: int) -> Tensor:
        """Part `index` of the product with `x`, which is made once for all parts."""
        if self.source is not x or index not in self.left:
            self.source, self.left = x, dict(enumerate(self(x).split(self.sizes, -1)))
        part = self.left.pop(index)
        if not self.left:
            self.source = None
        return part


class Share(nn.Module):
    """Stands where one of the joined maps was."""

    def __init__(self, joined: Joined, index: int) -> None:
        super().__init__()
        self.joined = [joined]
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        """Its rows of the joined product."""
        return self.joined[0].take(x, self.index)


class Closing(nn.Module):
    """Adds `residual`, where one was left for this call, to a product."""

    def __init__(self, linear: FusedLinear) -> None:
        super().__init__()
        self.linear = linear
        self.residual: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The product, and the residual."""
        residual, self.residual = self.residual, None
        return self.linear(x, residual=residual)


def can_fuse(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the kernels run where the packed weights of `model` are."""
    packed = next((module for module in model.modules() if isinstance(module, PackedLinear)), None)
    device = None if packed is None else next(packed.buffers()).device
    return device is not None and device.type == "cuda" and dtype in _HALVES and has_triton()


def fuse_layers(model: nn.Module, dtype: torch.dtype) -> int:
    """Fuses the layers that can be, before any module is repacked, and returns how many there are."""
    if getattr(model.config, "hidden_act", None) != "silu":
        return 0
    layers = [layer for layer in model.modules() if type(layer).__name__ in FAMILIES]
    return sum(_fuse(layer, dtype) for layer in layers)


def set_fusion(model: nn.Module, on: bool) -> None:
    """Lets fused layers run as such, or as transformers wrote them."""
    for layer in model.modules():
        if hasattr(layer, "fusion"):
            for joined in layer.fusion:  # pyright: ignore
                joined.active = on


def _fuse(layer: Any, dtype: torch.dtype) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    owners = {attention: ("q_proj", "k_proj", "v_proj", "o_proj"), mlp: ("gate_proj", "up_proj", "down_proj")}
    maps = [getattr(owner, name) for owner, names in owners.items() for name in names]
    norms = layer.input_layernorm, layer.post_attention_layernorm
    same = all(type(m) is PackedLinear and m.form == "stored" for m in maps)
    if not same or any(norm.weight.dtype != dtype for norm in norms):
        return False
    heads, gates = join(maps[:3]), join(maps[4:6])
    if heads is None or gates is None:
        return False
    joined = []
    for linear, norm, owner, names in (
        (heads, norms[0], attention, ("q_proj", "k_proj", "v_proj")), (gates, norms[1], mlp, ("gate_proj", "up_proj")),
    ):  # fmt: skip
        linear.repack(dtype)
        joined.append(Joined(linear, [getattr(owner, name).out_features for name in names]))
        joined[-1].norm.append(norm)
        for index, name in enumerate(names):
            setattr(owner, name, Share(joined[-1], index))
    for owner, name in ((attention, "o_proj"), (mlp, "down_proj")):
        closing = join([getattr(owner, name)], along="any")
        assert closing is not None
        closing.repack(dtype)
        setattr(owner, name, Closing(closing))
    layer.fusion = nn.ModuleList(joined)
    layer.forward = partial(_forward, layer)
    set_fusion(layer, True)
    return True


def join(maps: Sequence[PackedLinear], *, along: str = "rows") -> FusedLinear | None:
    """The maps below one another as one, still stored; None where parts lie along columns or biases are on some only.

    With `along` "any" a single map may have parts of either axis.
    """
    first = maps[0]
    descriptors = [_by_rows(linear.descriptor) for linear in maps]
    axes = {descriptor.axis for descriptor in descriptors}
    biases = [linear.bias for linear in maps if linear.bias is not None]
    if (along == "rows" and axes != {"rows"}) or len(biases) not in (0, len(maps)):
        return None
    parts: list[Part] = []
    total = 0
    for descriptor in descriptors:
        shift = total if descriptor.axis == "rows" else 0
        parts += [replace(part, start=part.start + shift, stop=part.stop + shift) for part in descriptor.parts]
        total += descriptor.rows
    whole = Descriptor(total, first.in_features, descriptors[0].axis, tuple(parts))
    fused = FusedLinear(whole, bias=False, device="meta")
    if biases:
        fused.bias = nn.Parameter(torch.cat([bias.data for bias in biases]), requires_grad=False)
    stored = [linear.stored for linear in maps]
    for name in whole.layout():
        fused.register_buffer(name, torch.cat([tensors[name] for tensors in stored if name in tensors]))
    return fused


def _by_rows(descriptor: Descriptor) -> Descriptor:
    """A matrix of a single part has it along rows as well."""
    part, *others = descriptor.parts
    if descriptor.axis == "rows" or others:
        return descriptor
    return replace(descriptor, axis="rows", parts=(replace(part, stop=descriptor.rows),))


def _forward(layer: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """The layer's own forward, or the fused one."""
    heads, gates = layer.fusion
    if not heads.active:
        return type(layer).forward(layer, hidden_states, **kwargs)
    layer.self_attn.o_proj.residual = hidden_states
    hidden_states, _ = layer.self_attn(hidden_states=hidden_states, **kwargs)
    down = layer.mlp.down_proj
    down.residual = hidden_states
    return down(gates(hidden_states, gated=True))
