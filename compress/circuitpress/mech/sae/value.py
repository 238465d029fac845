"""A sparse autoencoder as a frozen value: x = sum_f a_f d_f + bias + error.

Encoding, in the steps that all published architectures share:

1. The activations x [..., d] are brought to the frame that the weights were trained in: `x = scale * z + shift`, where
   scale and shift are 1 and 0, or a token's own (layer_norm: its standard deviation and mean; constant_norm_rescale:
   its norm over sqrt(d)).
2. pre = (z - b_dec) W_enc + b_enc, without b_dec where `subtract_bias` is off.
3. a = relu(pre), of which `topk` keeps the k largest of each token (arXiv 2406.04093) and `jumprelu` those above a
   threshold of their own (arXiv 2407.14435).
4. x^ = scale (a W_dec + b_dec) + shift.

BatchTopK has no form of its own: at inference it is a JumpReLU (arXiv 2412.06410). Everything is computed in float32 or
better, since SAEs in bfloat16 fire at other tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..sites import Site

Architecture = Literal["standard", "topk", "jumprelu"]
Normalisation = Literal["none", "layer_norm", "constant_norm_rescale"]


class Frame(NamedTuple):
    """How activations were normalised: x = scale * z + shift, both [..., 1] (layer_norm adds 1e-5 on the way in)."""

    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Sae:
    """w_enc [d, n], b_enc [n], w_dec [n, d], b_dec [d]; n features of activations with d numbers.

    `threshold` [n] belongs to jumprelu, `k` to topk. `by_decoder_norm` says that topk compares activations times the
    norm of their decoder row. `site` is where it reads (None where the folder does not say), `skip` how many positions
    at the start of a window it was not trained on. `config` holds what its folder says and nobody here reads, `extra`
    such tensors: writing it back changes nothing.
    """

    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_dec: Tensor
    architecture: Architecture
    threshold: Tensor | None = None
    k: int | None = None
    subtract_bias: bool = True
    normalisation: Normalisation = "none"
    by_decoder_norm: bool = False
    site: Site | None = None
    skip: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """ValueError for shapes that do not fit together."""
        d, n = self.w_enc.shape
        shapes = {"w_dec": (n, d), "b_enc": (n,), "b_dec": (d,)}
        if self.architecture == "jumprelu":
            shapes["threshold"] = (n,)
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is None or tuple(tensor.shape) != shape:
                found = "missing" if tensor is None else str(list(tensor.shape))
                raise ValueError(f"{name} is {found}, expected {list(shape)} beside w_enc {[d, n]}")
        if (self.architecture == "topk") != (self.k is not None):
            raise ValueError(f"architecture {self.architecture} with k = {self.k}: topk, and only topk, has a k")

    @property
    def width(self) -> int:
        """Numbers per token of the activations."""
        return self.w_enc.shape[0]

    @property
    def latents(self) -> int:
        """Number of features."""
        return self.w_enc.shape[1]

    def directions(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """d_f of all features [n, d]: what an activation of 1 adds to z."""
        w_dec = self.w_dec.to(dtype)
        return w_dec / w_dec.norm(dim=1, keepdim=True) if self.by_decoder_norm else w_dec

    def normalise(self, x: Tensor) -> tuple[Tensor, Frame]:
        """Activations [..., d] in the frame of the weights, in float32 or better, and that frame."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        zero = torch.zeros_like(x[..., :1])
        if self.normalisation == "layer_norm":
            shift = x.mean(-1, keepdim=True)
            frame = Frame((x - shift).std(-1, keepdim=True), shift)
            return (x - shift) / (frame.scale + 1e-5), frame
        if self.normalisation == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / self.width**0.5
            return x / scale, Frame(scale, zero)
        return x, Frame(torch.ones_like(zero), zero)

    def encode(self, x: Tensor) -> tuple[Tensor, Frame]:
        """The features' activations [..., n] for x [..., d], and the frame to decode them in."""
        z, frame = self.normalise(x)
        w_enc, b_enc, b_dec = (t.to(z.device, z.dtype) for t in (self.w_enc, self.b_enc, self.b_dec))
        pre = (z - b_dec if self.subtract_bias else z) @ w_enc + b_enc
        if self.architecture == "jumprelu":
            assert self.threshold is not None
            return pre.relu() * (pre > self.threshold.to(z.device, z.dtype)), frame
        if self.architecture == "topk":
            assert self.k is not None
            if self.by_decoder_norm:
                pre = pre * self.w_dec.to(z.device, z.dtype).norm(dim=1)
            return keep_largest(pre, self.k), frame
        return pre.relu(), frame

    def decode(self, a: Tensor, frame: Frame) -> Tensor:
        """x^ [..., d] of activations [..., n]."""
        z = a @ self.directions(a.dtype).to(a.device) + self.b_dec.to(a.device, a.dtype)
        return z * frame.scale + frame.shift

    def reconstruct(self, x: Tensor) -> Tensor:
        """x^ for x [..., d], in the type of x."""
        return self.decode(*self.encode(x)).to(x.dtype)


def keep_largest(pre: Tensor, k: int) -> Tensor:
    """relu of the k largest values of each row of `pre` [..., n], zero elsewhere."""
    values, index = pre.topk(min(k, pre.shape[-1]), dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter(-1, index, values.relu())
