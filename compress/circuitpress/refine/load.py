"""Loads a packed model with learnable codes in place of its packed matrices."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..anatomy import family_of
from ..checkpoint import Weights, read_headers
from ..formats import (
    CodebookFormat,
    Format,
    IntFormat,
    OutlierFormat,
    TrellisFormat,
    parse,
    split_segments,
)
from .books import SoftBook
from .grids import SoftInt, SoftOutliers
from .rings import SoftTrellis
from .soft import Fixed, Soft, SoftLinear


def soften(form: Format, value: Any) -> Soft:
    """The learnable side of one segment; formats without one are kept as they are."""
    match form:
        case IntFormat():
            return SoftInt(form, value)
        case OutlierFormat():
            return SoftOutliers(form, value)
        case CodebookFormat():
            return SoftBook(form, value)
        case TrellisFormat():
            return SoftTrellis(form, value)
        case _:
            return Fixed(form, value)


def load_soft(folder: Path, device: torch.device) -> tuple[nn.Module, dict[str, SoftLinear]]:
    """The packed model of `folder` in float32 on `device`, and its packed matrices as learnable modules by name."""
    import transformers

    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.requires_grad_(False).eval()
    headers = read_headers(folder, packed_ok=True)
    weights = Weights(headers, family_of(headers.config).prefix)
    soft = {}
    for name, entry in headers.packed.items():
        if not name.startswith(family_of(headers.config).blocks + "."):
            continue
        parts = _parts(weights, name, entry)
        bias = model.get_submodule(name).bias
        soft[name] = SoftLinear([soften(form, value) for form, value in parts], entry["axis"], bias)  # pyright: ignore
        model.set_submodule(name, soft[name])
    return model.to(device), soft  # pyright: ignore


def _parts(weights: Weights, module: str, entry: Mapping[str, Any]) -> list[tuple[Format, Any]]:
    spans = [(parse(part["format"]), part["start"], part["stop"]) for part in entry["segments"]]
    values = split_segments(weights.packed(module), entry["shape"], spans, entry["axis"])
    return [(form, value) for (form, _, _), value in zip(spans, values, strict=True)]
