"""What a run will need, from config and headers alone: `circuitpress check`, and the disk check before any work.

Memory, in the order of size on a large model: embeddings and lm_head stay resident; one block is resident with its
weights, the Hessians of its inputs in float32, its codes in every format of the menu (one byte a weight), what one
micro-batch keeps for the backward pass and, up to a limit, what all of them left; hidden states stay in memory up to a
limit and then go to disk. The figure is
an estimate, meant to be within a factor of 1.5: 0.9 GB were measured on the demo checkpoint where it says 0.8.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from ..anatomy import Anatomy, Block
from ..console import size
from ..recipe import Recipe

BASE = 500_000_000  # a process that has imported torch and transformers: 0.45 to 0.55 GB, measured on CPU
STORE_LIMIT = 1 << 29  # hidden states kept in memory by each of the two stores of a pass
FLOWS_LIMIT = 1 << 29  # inputs and gradients of matrices that pricing keeps (price.KEPT_FLOWS)
HESSIANS_LIMIT = 1 << 28  # Hessians of all blocks, above which none is stored (price.KEPT_HESSIANS)
LOGITS = 1 << 26  # four arrays of 2**22 float32
BATCH_TOKENS = 4096  # of one micro-batch, the stream's default
_ITEM = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Needs:
    """Bytes of memory at the peak and of disk, by cause."""

    memory: dict[str, int]
    disk: dict[str, int]

    @property
    def peak_memory(self) -> int:
        """Sum over causes."""
        return sum(self.memory.values())

    @property
    def device_memory(self) -> int:
        """What of it lies on the GPU if one computes: all but the process itself."""
        return self.peak_memory - self.memory["process"]

    @property
    def peak_disk(self) -> int:
        """Sum over causes."""
        return sum(self.disk.values())


def estimate(anatomy: Anatomy, recipe: Recipe) -> Needs:
    """The needs of a whole run of `recipe` on the model."""
    data = recipe.data
    length = min(data.length, anatomy.context or data.length)
    tokens = data.samples * length
    # The stream's own rule: small models compute in float32, which costs them little and is exact.
    name = recipe.run.dtype
    if name == "auto":
        name = "float32" if anatomy.linear_numel <= 300_000_000 else anatomy.dtype
    item = _ITEM[name]
    states = (len(anatomy.blocks) + 1) * tokens * anatomy.hidden * item
    gradients = recipe.score.draws * tokens * anatomy.hidden * item
    formats = len({*recipe.plan.formats, *recipe.plan.probes})
    saliency = 4 * tokens * sum(len(block.matrices) for block in anatomy.blocks)
    flows = tokens * recipe.score.draws * item * max(_flow_width(block) for block in anatomy.blocks)
    hessians = 4 * sum(matrix.cols**2 for block in anatomy.blocks for matrix in block.matrices)
    return Needs(
        memory={
            "process": BASE,
            "embeddings": anatomy.other_bytes * item // _ITEM[anatomy.dtype],
            "block": max(_block_bytes(block, item, formats) for block in anatomy.blocks),
            "activations": max(_activation_bytes(block, item, min(tokens, BATCH_TOKENS)) for block in anatomy.blocks),
            "flows": min(flows, FLOWS_LIMIT),
            "states": min(states, STORE_LIMIT) + min(gradients, STORE_LIMIT),
            "logits": LOGITS,
        },
        disk={
            "model": _model_bytes(anatomy, recipe.plan.budget),
            "prices": saliency + (hessians if hessians <= HESSIANS_LIMIT else 0),
            "spilled states": max(0, states - STORE_LIMIT) + max(0, gradients - STORE_LIMIT),
        },
    )


def _block_bytes(block: Block, item: int, formats: int) -> int:
    numel = sum(matrix.numel for matrix in block.matrices)
    hessians = 4 * sum(matrix.cols**2 for matrix in block.matrices)
    largest = max(matrix.numel for matrix in block.matrices)
    return numel * (item + formats) + hessians + 8 * largest  # two float32 copies of the matrix that is being rounded


def _flow_width(block: Block) -> int:
    """Numbers a token in the inputs and output gradients of all matrices."""
    return sum(matrix.rows + matrix.cols for matrix in block.matrices)


def _activation_bytes(block: Block, item: int, tokens: int) -> int:
    """Inputs and outputs of all matrices of one micro-batch, and as much again for what lies between them."""
    return 2 * tokens * item * _flow_width(block)


def _model_bytes(anatomy: Anatomy, budget: str) -> int:
    """An upper bound of the model's files."""
    bits = re.fullmatch(r"([\d.]+)\s*bpw", budget)
    if bits is None:
        return anatomy.file_bytes
    return min(anatomy.file_bytes, math.ceil(float(bits[1]) / 8 * anatomy.linear_numel) + anatomy.other_bytes)


def describe(anatomy: Anatomy, needs: Needs) -> tuple[str, dict[str, Any]]:
    """The output of `check`: lines for people and the same as a document."""
    first = anatomy.blocks[0]
    each = f"{first.heads} heads ({first.kv_heads} KV groups) and {first.neurons} neurons"
    counts = {
        "head": sum(block.heads for block in anatomy.blocks),
        "kv_group": sum(block.kv_heads for block in anatomy.blocks),
        "neuron": sum(block.neurons for block in anatomy.blocks),
    }
    matrices = sum(len(block.matrices) for block in anatomy.blocks)
    rows = {
        "model": str(anatomy.folder),
        "architecture": f"{anatomy.model_type}, {anatomy.dtype}, supported",
        "blocks": f"{len(anatomy.blocks)} of {each}",
        "width": f"hidden {anatomy.hidden}, vocabulary {anatomy.vocab}, context {anatomy.context}",
        "units": f"{counts['head']} heads, {counts['kv_group']} KV groups, {counts['neuron']} neurons",
        "linear weights": f"{anatomy.linear_numel:,} in {matrices} matrices, {anatomy.bits_per_weight:.2f} bits each",
        "weight files": f"{size(anatomy.file_bytes)}, of which embeddings and the rest {size(anatomy.other_bytes)}",
        "peak memory": f"about {size(needs.peak_memory)} for a run with default settings",
        "on a GPU": f"about {size(needs.device_memory)} of it, if one computes",
        "disk": f"about {size(needs.peak_disk)} in the run folder",
    }
    text = "\n".join(f"{name:<15} {value}" for name, value in rows.items())
    document = {
        "model": str(anatomy.folder),
        "model_type": anatomy.model_type,
        "supported": True,
        "dtype": anatomy.dtype,
        "blocks": len(anatomy.blocks),
        "hidden": anatomy.hidden,
        "vocab": anatomy.vocab,
        "context": anatomy.context,
        "units": counts,
        "matrices": matrices,
        "linear_numel": anatomy.linear_numel,
        "linear_bytes": anatomy.linear_bytes,
        "other_bytes": anatomy.other_bytes,
        "bytes": anatomy.file_bytes,
        "peak_memory": needs.peak_memory,
        "device_memory": needs.device_memory,
        "memory": needs.memory,
        "disk": needs.disk,
    }
    return text, document
