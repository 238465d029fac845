"""Reads weights that bitsandbytes packed, as transformers saves them, so that such a model can be looked into.

| kind | `weight` | beside it | a weight |
|---|---|---|---|
| nf4, fp4 | two codes a byte, the first in the high half, of the flattened matrix | `weight.quant_map` (16 values), \
`weight.absmax` of every block, `weight.quant_state.bitsandbytes__nf4` (JSON: block size, shape) | map[code] absmax |
| the same, twice | | absmax are bytes: map `weight.nested_quant_map`, `weight.nested_absmax`, an offset | |
| int8 | int8 [rows, cols] | `SCB`, the largest size in each row | code SCB / 127 |

The tables lie in the file, so decoding takes a few lines and no bitsandbytes, whose own CPU path (version 0.50.2) is
wrong where a row is a multiple of 32 weights but not of 64. What LLM.int8 does to activations while it multiplies (8
bits, but for outliers) is no property of the weights and is left out: logits differ by that. Dettmers et al. 2023,
https://arxiv.org/abs/2305.14314; 2022, https://arxiv.org/abs/2208.07339.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError

if TYPE_CHECKING:
    import torch

METHOD = "bitsandbytes"
"""The `quant_method` of such a model."""
_STATE = re.compile(r"(.+)\.weight\.quant_state\.bitsandbytes__(?:nf4|fp4)")


def packed_modules(
    shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], bytes]
) -> dict[str, tuple[int, int, dict[str, Any]]]:
    """Rows, columns and state of every packed module; the state of an int8 module is empty.

    `shapes` are those of all tensors by name; `read` fetches the bytes of one of them, only the small ones that hold
    JSON. Raises CheckpointError.
    """
    found: dict[str, tuple[int, int, dict[str, Any]]] = {}
    for name, shape in shapes.items():
        if state := _STATE.fullmatch(name):
            entry = _parse(name, read(name))
            rows, cols = entry["shape"]
            found[state[1]] = rows, cols, entry
        elif name.endswith(".SCB"):
            module = name.removesuffix(".SCB")
            rows, cols = shapes.get(f"{module}.weight", (0, 0))
            if rows != shape[0]:
                hint = "the checkpoint is incomplete: save or download it again"
                raise CheckpointError(f"{module}: {shape[0]} scales for {rows} rows", hint=hint)
            found[module] = rows, cols, {}
    return found


def decode(
    read: "Callable[[str], torch.Tensor]", module: str, rows: int, cols: int, state: Mapping[str, Any]
) -> "torch.Tensor":
    """The weights of a packed module, float32 [rows, cols]; `read` fetches a tensor by name. Raises CheckpointError."""
    import torch

    if not state:
        codes = read(f"{module}.weight")
        return codes.float() * (read(f"{module}.SCB").float() / 127)[:, None]
    # The bytes may be stored as another type (bnb_4bit_quant_storage).
    pairs = read(f"{module}.weight").contiguous().view(-1).view(torch.uint8).int()
    codes = torch.stack([pairs >> 4, pairs & 15], 1).flatten()[: rows * cols]
    largest = read(f"{module}.weight.absmax")
    if "nested_blocksize" in state:
        spread = _spread(read(f"{module}.weight.nested_absmax"), state["nested_blocksize"], largest.numel())
        largest = read(f"{module}.weight.nested_quant_map")[largest.int()] * spread + state["nested_offset"]
    values = read(f"{module}.weight.quant_map").float()[codes]
    return (values * _spread(largest.float(), state["blocksize"], rows * cols)).view(rows, cols)


def _spread(sizes: "torch.Tensor", block: int, count: int) -> "torch.Tensor":
    """One value for every number, where `sizes` has one for a block."""
    return sizes.repeat_interleave(block)[:count]


def _parse(name: str, raw: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(raw)
        rows, cols = entry["shape"]
        if min(rows, cols, entry["blocksize"]) < 1:
            raise ValueError("a size below 1")
    except (ValueError, KeyError, TypeError) as error:
        hint = "the checkpoint is damaged, or of a later bitsandbytes: save it again, or pass the original"
        raise CheckpointError(f"{name} does not describe a 4-bit matrix: {error!r}", hint=hint) from error
    return entry
