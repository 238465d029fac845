"""compressed-tensors: how vLLM and transformers store integers (https://github.com/vllm-project/compressed-tensors).

    weight_packed  int32 [rows, ceil(cols bits / 32)]   codes end to end in words, the first in the lowest bits
    weight_scale   [rows, groups]                        in the type of the model
    weight_shape   int64 [2]

Codes count from 0 (a 4-bit -8), which is how formats/integer.py has them, and a row begins with a new word. What is
written is "pack-quantized"; config.json lists every packed module in a group of its scheme and every other linear layer
under `ignore`, since some versions of vLLM refuse layers that are in neither.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..formats import Format, IntFormat, parse
from ..formats.integer import IntCodes
from .source import Source

PACKAGE = "compressed_tensors"


def encode(form: Format, value: IntCodes, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one matrix by their name in its module; scales in `dtype`."""
    assert isinstance(form, IntFormat) and form.symmetric
    shape = torch.tensor(value.codes.shape, dtype=torch.int64)
    scales = value.scales.to(dtype)
    assert torch.equal(scales.float(), value.scales.float()), "scales are numbers of both 16-bit types"
    return {"weight_packed": pack_words(value.codes, form.bits), "weight_scale": scales, "weight_shape": shape}


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [rows, cols] below 2^bits as int32 [rows, ceil(cols bits / 32)]."""
    low_first = np.unpackbits(codes.cpu().numpy()[:, :, None], axis=2, count=bits, bitorder="little")
    stream = low_first.reshape(len(codes), -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    words = np.packbits(stream, axis=1, bitorder="little").view("<u4").astype(np.uint32)
    return torch.from_numpy(words.view(np.int32).copy())


def config(source: Source, dtype: torch.dtype) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    del dtype
    schemes: dict[IntFormat, list[str]] = {}
    for module in source.headers.packed:
        form = parse(source.formats(module)[0])
        assert isinstance(form, IntFormat)
        schemes.setdefault(form, []).append(module)
    groups = {f"group_{k}": _scheme(form, names) for k, (form, names) in enumerate(schemes.items())}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": source.floating_linears,
    }


def _scheme(form: IntFormat, names: list[str]) -> Mapping[str, Any]:
    strategy = {"strategy": "group", "group_size": form.group_size} if form.group_size else {"strategy": "channel"}
    weights = {"num_bits": form.bits, "type": "int", "symmetric": True, "dynamic": False, **strategy}
    return {"targets": names, "weights": weights, "input_activations": None, "format": "pack-quantized"}
