"""bitsandbytes: how transformers stores nf4 and int8 (https://github.com/bitsandbytes-foundation/bitsandbytes).

| format | `weight` | beside it |
|---|---|---|
| nf4 | uint8 [rows cols / 2, 1]: two codes, the first in the high half | `weight.absmax` float32 a block, \
`weight.quant_map` the 16 levels, `weight.quant_state.bitsandbytes__nf4` a line of JSON |
| llmint8 | int8 [rows, cols] | `SCB` float32 [rows], `weight_format` 0: rows |

`llm_int8_skip_modules` names what stays floating, whichever of the two it is. A folder holds one of them: transformers
makes all packed modules of one class (measured, 5.23: an int8 matrix in an nf4 folder is reported as unexpected tensors
and the first forward pass fails).
"""

import json
from typing import Any

import torch
from torch import Tensor

from ..formats import AbsmaxCodes, AbsmaxFormat, Format
from .source import Source

PACKAGE = "bitsandbytes"


def encode(form: Format, value: AbsmaxCodes, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one matrix by their name in its module; its weights are said to have been `dtype`."""
    assert isinstance(form, AbsmaxFormat)
    rows, cols = value.codes.shape
    if form.bits == 8:
        codes = (value.codes.to(torch.int16) - 127).to(torch.int8)
        return {"weight": codes, "SCB": value.absmax[:, 0].contiguous(), "weight_format": torch.tensor(0).byte()}
    pairs = value.codes.reshape(-1, 2)
    state = {
        "quant_type": "nf4", "blocksize": form.block, "dtype": str(dtype).removeprefix("torch."), "shape": [rows, cols],
    }  # fmt: skip
    return {
        "weight": (pairs[:, :1] << 4) | pairs[:, 1:],
        "weight.absmax": value.absmax.reshape(-1).contiguous(),
        "weight.quant_map": form.levels,
        "weight.quant_state.bitsandbytes__nf4": torch.frombuffer(
            bytearray(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }


def config(source: Source, dtype: torch.dtype) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    eight = "llmint8" in {source.formats(module)[0] for module in source.headers.packed}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": not eight,
        "load_in_8bit": eight,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": source.floating_linears,
        "llm_int8_threshold": 6.0,
    }
