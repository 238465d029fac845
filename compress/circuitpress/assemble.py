"""A model folder from finished shards: config, tokenizer, index, and one rename when it is whole."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import atomic, write_bytes_atomic

if TYPE_CHECKING:
    import torch

    import circuitpress.anatomy
    import circuitpress.checkpoint

METADATA = {"format": "pt"}
"""transformers asks for it. One key only: safetensors writes several in random order, which would change the bytes."""

_CARRIED = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*")


def outer_tensors(
    headers: "circuitpress.checkpoint.Headers",
    weights: "circuitpress.checkpoint.Weights",
    anatomy: "circuitpress.anatomy.Anatomy",
) -> "dict[str, torch.Tensor]":
    """Everything outside the decoder blocks (embeddings, final norm, lm_head), by its name in the model."""
    prefixes = tuple(block.prefix + "." for block in anatomy.blocks)
    names = [weights.model_name(stored) for stored in headers.tensors]
    return {name: weights.read(name) for name in names if not name.startswith(prefixes)}


def assemble(source: Path, config: Mapping[str, Any], shards: Sequence[Path], out: Path) -> None:
    """Builds the model folder `out` of `shards`; the previous folder, if any, is replaced.

    Tokenizer, licence and other small files come from the checkpoint `source`. Built beside `out` and renamed, so there
    is never half of it. Raises CircuitpressError when a file cannot be written.
    """
    from safetensors import safe_open

    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for pattern in _CARRIED:
        for file in source.glob(pattern):
            if file.name not in ("config.json", "model.safetensors.index.json"):
                shutil.copy2(file, partial / file.name)
    write_bytes_atomic(partial / "config.json", (json.dumps(dict(config), indent=2) + "\n").encode())
    index: dict[str, str] = {}
    size = 0
    for k, shard in enumerate(shards):
        name = f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors"
        try:
            os.link(shard, partial / name)
        except OSError:
            with atomic(partial / name) as path:
                shutil.copyfile(shard, path)
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                index[key] = name
        size += shard.stat().st_size
    document = {"metadata": {"total_size": size}, "weight_map": index}
    write_bytes_atomic(partial / "model.safetensors.index.json", (json.dumps(document, indent=1) + "\n").encode())
    shutil.rmtree(out, ignore_errors=True)
    partial.replace(out)
