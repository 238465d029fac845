"""Packed models in the formats of other runtimes, small enough for seconds."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from circuitpress.apply import apply
from circuitpress.export import Source, open_source
from circuitpress.price import price
from circuitpress.stream import open_stream
from circuitpress.units import Decision, Plan

from ..whole import tokens

Pack = Callable[[Path, Callable[[str], str]], Source]
SIZES: Mapping[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 40, "initializer_range": 0.2,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="session")
def llama(build_checkpoint: Callable[..., Path]) -> Path:
    """Llama, float32, untied: hidden 64, 2 blocks, 128 neurons."""
    from transformers import LlamaConfig

    return build_checkpoint("export-llama", LlamaConfig(**SIZES, tie_word_embeddings=False, dtype="float32"))


@pytest.fixture(scope="session")
def qwen(build_checkpoint: Callable[..., Path]) -> Path:
    """Qwen2, bfloat16, tied, biases on q, k and v: hidden 64, 2 blocks, 96 neurons."""
    from transformers import Qwen2Config

    config = Qwen2Config(**dict(SIZES) | {"intermediate_size": 96}, tie_word_embeddings=True, dtype="bfloat16")
    return build_checkpoint("export-qwen", config)


@pytest.fixture(scope="session")
def gpt2(build_checkpoint: Callable[..., Path]) -> Path:
    """GPT-2, float32, tied, Conv1D with biases: hidden 64, 2 blocks, 128 neurons."""
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_inner=128, n_positions=32, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0, dtype="float32",
    )  # fmt: skip
    return build_checkpoint("export-gpt2", config)


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    """`pack(checkpoint, choose)`: the checkpoint as `apply` writes it, every matrix in the format `choose(module)`."""

    def run(folder: Path, choose: Callable[[str], str]) -> Source:
        ids, stream = tokens(4, 8), open_stream(folder)
        formats = dict.fromkeys(choose(m.module) for block in stream.anatomy.blocks for m in block.matrices)
        _, prices = price(stream, ids, formats=list(formats), folder=tmp_path / "pricing")
        decisions = tuple(
            Decision(group, choose(group.name), int(prices.nbytes[i, prices.column(choose(group.name))]), 0.0)
            for i, group in enumerate(prices.groups)
        )
        plan = Plan("test", "test", decisions, 1, 1, 0, 0.0, None, 0.0)
        apply(stream, plan, ids, saliency=tmp_path / "pricing", shards=tmp_path / "shards", out=tmp_path / "model")
        return open_source(tmp_path / "model")

    return run
