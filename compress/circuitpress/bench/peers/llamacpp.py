# pyright: reportMissingImports=false
"""llama.cpp's K-quants and IQ types with an importance matrix, by the function that llama-quantize calls.

https://github.com/ggml-org/llama.cpp. The package llama-cpp-python carries its libraries; `ggml_quantize_chunk`
(ggml/include/ggml.h) rounds the rows of one matrix, so neither a GGUF file nor a tokenizer is needed:

1. The importance of a column is the mean of its squared input over the calibration tokens, as tools/imatrix has it.
2. Every matrix is rounded to one type; where its blocks do not divide the columns, to the type that llama.cpp takes
   instead (src/llama-quant.cpp, tensor_type_fallback).
3. The package gguf decodes what is stored.

All matrices have one type, which `llama-quantize --pure` does; its mixtures spend more on some by a rule of thumb.
"""

import ctypes
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .protocol import Job, Kept

SMALLER = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "IQ2_S": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ4_XS": "IQ4_NL",
}  # fmt: skip
"""The type in blocks of 32 that llama.cpp falls back on."""


def quantize(job: Job) -> Mapping[str, Kept]:
    """`options`: type, a name of gguf.GGMLQuantizationType such as `Q3_K`."""
    from gguf import GGML_QUANT_SIZES, quants

    wanted = job.options["type"]
    kinds = {name: _kind(wanted, cols) for name, (_, cols) in job.matrices.items()}
    if wanted not in {kind.name for kind in kinds.values() if kind is not None}:
        raise ValueError(f"{wanted}: its blocks divide the columns of no matrix")
    quantizer, model = _quantizer(), job.load()
    with job.timed():
        importance = _importance(model, job)
    found = {}
    for name, linear in job.linears(model).items():
        kind = kinds[name]
        if kind is None or kind.name != wanted:
            job.notes.append(f"{name} in {kind.name if kind else '16 bits'}")
        if kind is None:
            continue
        block, size = GGML_QUANT_SIZES[kind]
        row_bytes = job.matrices[name][1] // block * size
        with job.timed():
            data = _rounded(quantizer, int(kind), linear.weight.detach().numpy(), importance[name], row_bytes)
        found[name] = Kept(torch.from_numpy(quants.dequantize(data, kind).copy()), data.nbytes)
    return found


def _kind(wanted: str, cols: int) -> Any:
    """The type of a matrix with `cols` columns; None if it stays floating."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kinds = [GGMLQuantizationType[name] for name in (wanted, SMALLER.get(wanted, wanted))]
    return next((kind for kind in kinds if cols % GGML_QUANT_SIZES[kind][0] == 0), None)


def _quantizer() -> Callable[..., int]:
    """ggml_quantize_chunk(type, source, target, start, rows, cols, importance) -> bytes, of llama-cpp-python's ggml."""
    found = importlib.util.find_spec("llama_cpp")
    assert found is not None and found.origin is not None
    name = {"win32": "ggml-base.dll", "darwin": "libggml-base.dylib"}.get(sys.platform, "libggml-base.so")
    function = ctypes.CDLL(str(Path(found.origin).parent / "lib" / name)).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    return function


def _rounded(
    quantizer: Callable[..., int], kind: int, weight: NDArray[np.float32], importance: NDArray[np.float32],
    row_bytes: int,
) -> NDArray[np.uint8]:  # fmt: skip
    """What ggml stores for `weight` [rows, cols]: bytes [rows, row_bytes]."""
    weight = np.ascontiguousarray(weight)
    out = np.zeros((len(weight), row_bytes), dtype=np.uint8)
    done = quantizer(kind, weight.ctypes.data, out.ctypes.data, 0, *weight.shape, importance.ctypes.data)
    if done != out.nbytes:
        raise ValueError(f"ggml wrote {done} bytes, {out.nbytes} were expected")
    return out


@torch.no_grad()
def _importance(model: Any, job: Job) -> dict[str, NDArray[np.float32]]:
    """The mean squared input [cols] of every matrix over the calibration tokens."""
    sums: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            flat = inputs[0].flatten(0, -2).float()
            sums[name] = sums.get(name, 0) + flat.square().sum(0)

        return hook

    hooks = [linear.register_forward_pre_hook(keep(name)) for name, linear in job.linears(model).items()]
    tokens = job.tokens()
    for batch in tokens.split(8):
        model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: (total / tokens.numel()).numpy() for name, total in sums.items()}
