"""llama.cpp as a peer without llama.cpp: the package gguf stands in for ggml, which is compiled where the peer runs."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from circuitpress.anatomy import Block, read_anatomy
from circuitpress.bench.peers import llamacpp
from circuitpress.bench.peers.protocol import Job

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 97,
}


class StandIn:
    """Q4_0 by the package gguf, called as ggml is; remembers the importance that it was given."""

    def __init__(self) -> None:
        self.importance: list[NDArray[np.float32]] = []

    def __call__(self, kind: int, source: int, target: int, start: int, rows: int, cols: int, importance: int) -> int:
        assert (kind, start) == (int(gguf.GGMLQuantizationType.Q4_0), 0)
        packed = gguf.quants.quantize(_floats(source, rows * cols).reshape(rows, cols), gguf.GGMLQuantizationType.Q4_0)
        ctypes.memmove(target, packed.tobytes(), packed.nbytes)
        self.importance.append(_floats(importance, cols))
        return packed.nbytes


def _floats(address: int, count: int) -> NDArray[np.float32]:
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (count,)).copy()


@pytest.fixture(scope="module")
def llama(build_checkpoint: Callable[..., Path]) -> Path:
    """32 divides 64 inputs, and not the 80 of `down`."""
    config = LlamaConfig(
        **SIZES, intermediate_size=80, num_hidden_layers=2, bos_token_id=0, eos_token_id=0, dtype="float32"
    )
    return build_checkpoint("llamacpp", config)


def job_for(llama: Path, folder: Path, kind: str, blocks: tuple[Block, ...]) -> Job:
    ids = torch.randint(1, 97, (10, 12), generator=torch.Generator().manual_seed(0))
    save_file({"ids": ids}, folder / "ids.safetensors")
    matrices = {m.module: (m.rows, m.cols) for block in blocks for m in block.matrices}
    return Job(str(llama), str(folder / "ids.safetensors"), 4, 32, {"type": kind}, matrices, str(folder))


def test_rows_are_packed_with_the_mean_square_of_their_inputs(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = read_anatomy(llama).blocks
    stand_in = StandIn()
    monkeypatch.setattr(llamacpp, "_quantizer", lambda: stand_in)
    job = job_for(llama, tmp_path, "Q4_0", blocks)
    kept = llamacpp.quantize(job)

    model: Any = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    assert {note.rpartition(" in ")[2] for note in job.notes} == {"16 bits"}
    assert set(job.matrices) - set(kept) == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    for name, entry in kept.items():
        weight = model.get_submodule(name).weight.detach().numpy()
        packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_0)
        assert entry.nbytes == packed.nbytes == weight.size // 32 * 18
        np.testing.assert_array_equal(
            entry.weight.numpy(), gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_0)
        )
    # What enters q of the first block: the normalized embeddings.
    first = model.model.layers[0].input_layernorm(model.model.embed_tokens(job.tokens())).detach().double()
    expected = first.square().mean((0, 1)).numpy()
    np.testing.assert_allclose(stand_in.importance[0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("wanted", "cols", "expected"),
    [("Q2_K", 512, "Q2_K"), ("Q2_K", 384, "Q4_0"), ("Q4_K", 384, "Q5_0"), ("IQ4_XS", 96, "IQ4_NL"),
     ("IQ4_NL", 96, "IQ4_NL"), ("IQ4_NL", 80, None), ("Q3_K", 172, None)],
)  # fmt: skip
def test_a_matrix_whose_columns_do_not_fit_falls_back(wanted: str, cols: int, expected: str | None) -> None:
    found = llamacpp._kind(wanted, cols)
    assert (found and found.name) == expected


def test_a_type_that_fits_nothing_is_an_error(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Q3_K: its blocks divide the columns of no matrix"):
        llamacpp.quantize(job_for(llama, tmp_path, "Q3_K", read_anatomy(llama).blocks))
