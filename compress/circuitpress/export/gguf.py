"""llama.cpp: a type for every tensor and an importance matrix, beside the model as it was before rounding.

llama.cpp packs tensors itself, and better from the original than from what was rounded once. So a plan for it is told
in its own terms (https://github.com/ggml-org/llama.cpp, tools/quantize and tools/imatrix):

- `tensor-types.txt` for `llama-quantize --tensor-type-file`: a regular expression and a type for every matrix;
- `imatrix.gguf` for `--imatrix`: for every matrix the sum over tokens of x_j^2 (`in_sum2`) and their number (`counts`).
  Ours weighs tokens by how much the loss feels them: the diagonal of H = E[s x x^T], scaled to a mean of one a matrix,
  since llama.cpp uses nothing but ratios within a row;
- the folder of the unrounded (pruned) model, which `convert_hf_to_gguf.py` turns into a GGUF file.

The importance matrix is read back with the package `gguf`, and the folder's logits are compared as everywhere. What
llama.cpp makes of all three is measured by benchmarks/llama_cpp.py.
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..anatomy import Anatomy, Matrix
from ..assemble import assemble
from ..checkpoint import read_headers
from ..errors import CircuitpressError
from ..files import atomic, write_bytes_atomic
from ..plan.serving import Stored
from ..plan.targets import tensor_type

PACKAGE = "gguf"
ROLES = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "qkv": "attn_qkv", "o": "attn_output", "gate": "ffn_gate",
    "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
"""What llama.cpp calls the matrices of a block."""
TYPES, IMATRIX = "tensor-types.txt", "imatrix.gguf"
OUTTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""convert_hf_to_gguf.py's names of floating types. Left to itself it makes float16 of float32."""


def tensor_name(layer: int, matrix: Matrix) -> str:
    """Such as `blk.3.attn_q.weight`."""
    return f"blk.{layer}.{ROLES[matrix.role]}.weight"


def tensor_types(anatomy: Anatomy, stored: Mapping[str, Stored]) -> dict[str, str]:
    """The type of every matrix by its name in llama.cpp, for a plan that gguf can hold."""
    types = {}
    for block in anatomy.blocks:
        for matrix in block.matrices:
            kind = tensor_type(stored[matrix.module].formats[0], matrix.cols)
            assert kind is not None
            types[tensor_name(block.index, matrix)] = kind.name
    return types


def write_types(types: Mapping[str, str], path: Path) -> None:
    """One `regex=type` a line, each matching one tensor."""
    lines = [f"^{name.replace('.', chr(92) + '.')}$={kind}" for name, kind in types.items()]
    write_bytes_atomic(path, ("\n".join(lines) + "\n").encode())


def write_imatrix(
    anatomy: Anatomy, diagonals: Mapping[str, NDArray[np.float32]], path: Path, *, windows: int, length: int, text: str
) -> None:
    """Writes `diagonals` (of H [cols] by module) in llama.cpp's format; `text` names what they were computed on."""
    import gguf

    with atomic(path) as partial:
        writer: Any = gguf.GGUFWriter(partial, "")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [text])
        writer.add_uint32("imatrix.chunk_count", windows)
        writer.add_uint32("imatrix.chunk_size", length)
        tokens = float(windows * length)
        for block in anatomy.blocks:
            for matrix in block.matrices:
                name = tensor_name(block.index, matrix)
                weights = importance(diagonals[matrix.module])
                writer.add_tensor(f"{name}.in_sum2", (weights * tokens)[None])
                writer.add_tensor(f"{name}.counts", np.array([[tokens]], dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def importance(diagonal: NDArray[np.float32]) -> NDArray[np.float32]:
    """The diagonal scaled to a mean of one; none is zero, which llama.cpp would take for a column without data."""
    mean = float(diagonal.astype(np.float64).mean())
    if not (np.isfinite(mean) and mean > 0):
        return np.ones_like(diagonal)
    return np.maximum(diagonal / mean, 1e-6).astype(np.float32)


def read_imatrix(path: Path) -> dict[str, NDArray[np.float32]]:
    """Mean importance [cols] by tensor name, as llama.cpp reads the file."""
    import gguf

    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    names = [name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")]
    return {
        name: (tensors[f"{name}.in_sum2"] / tensors[f"{name}.counts"]).reshape(-1).astype(np.float32) for name in names
    }


def write_gguf(
    anatomy: Anatomy, stored: Mapping[str, Stored], diagonals: Mapping[str, NDArray[np.float32]], out: Path, *,
    windows: int, length: int, text: str,
) -> dict[str, Any]:  # fmt: skip
    """Fills the folder `out` with the model of `anatomy` (unrounded), types and importance; the entries of export.json.

    Raises CircuitpressError if the importance matrix does not read back.
    """
    headers = read_headers(anatomy.folder)
    files = sorted({header.file.resolve() for header in headers.tensors.values()})
    assemble(anatomy.folder, headers.config, files, out)
    types = tensor_types(anatomy, stored)
    write_types(types, out / TYPES)
    write_imatrix(anatomy, diagonals, out / IMATRIX, windows=windows, length=length, text=text)
    found = read_imatrix(out / IMATRIX)
    sizes = {tensor_name(block.index, m): m.cols for block in anatomy.blocks for m in block.matrices}
    if {name: len(values) for name, values in found.items()} != sizes:
        raise CircuitpressError(f"{IMATRIX} does not read back as it was written", hint="pip install --upgrade gguf")
    nbytes = 0
    for block in anatomy.blocks:
        for matrix in block.matrices:
            kind = tensor_type(stored[matrix.module].formats[0], matrix.cols)
            assert kind is not None
            nbytes += matrix.rows * (matrix.cols // kind.block) * kind.nbytes
    return {"types": types, "linear_bytes": nbytes}


def commands(anatomy: Anatomy, out: Path) -> list[str]:
    """What to type next in the folder of llama.cpp, for the export `out` of the model of `anatomy`.

    What lies outside the decoder blocks stays as wide as it is.
    """
    folder = shlex.quote(str(out.absolute()))
    model, packed = f"{folder}/model-unrounded.gguf", f"{folder}/model.gguf"
    wide = "f32" if anatomy.dtype == "float32" else "f16"
    told = f"--imatrix {folder}/{IMATRIX} --tensor-type-file {folder}/{TYPES}"
    keep = f"--token-embedding-type {wide} --output-tensor-type {wide}"
    outtype = OUTTYPES.get(anatomy.dtype, "auto")
    return [
        f"{_converter(anatomy.folder / 'tokenizer.json')} {folder} --outfile {model} --outtype {outtype}",
        f"llama-quantize {told} {keep} {model} {packed} Q4_K_M",
    ]


def _converter(tokenizer: Path) -> str:
    """convert_hf_to_gguf.py, told how text is split where a tokenizer splits it as GPT-2's does.

    It knows the tokenizers of published models by a hash of what they make of one text, and refuses a byte-level BPE
    that was trained for a new model, whose hash is in no list.
    """
    found = json.loads(tokenizer.read_text()) if tokenizer.exists() else {}
    split = found.get("pre_tokenizer") or {}
    like_gpt2 = split.get("type") == "ByteLevel" and split.get("use_regex", True) and not found.get("normalizer")
    if not like_gpt2:
        return "python convert_hf_to_gguf.py"
    known = "conversion.TextModel.get_vocab_base_pre = lambda *_: 'gpt-2'"
    run = "runpy.run_path('convert_hf_to_gguf.py', run_name='__main__')"
    return f'python -c "import runpy, conversion; {known}; {run}"'
