"""Widths: how many neurons and key-value groups every layer keeps, and how a config.json says so. No torch here.

Pruned models are ordinary dense checkpoints, so their shapes must be ones that transformers can build. All layers of
a config share one `intermediate_size` and one number of heads, hence one width for neurons and one for key-value
groups. A group leaves with all query heads that read it: the ratio of heads to groups is fixed by the architecture.

- Llama's config refuses a number of heads that does not divide the hidden size, though the model itself would run. A
  Mistral without sliding window computes the same function and takes any number, so such a model is written as one.
- GPT-2's config has no head size of its own: its heads cannot be pruned, its neurons can.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .anatomy import Anatomy, Block, Matrix
from .errors import CheckpointError, RecipeError

KEY = "circuitpress"
"""The entry of a pruned model's config.json that says what it was pruned from."""


@dataclass(frozen=True, order=True)
class Widths:
    """Neurons and key-value groups that stay in every layer."""

    neurons: int
    kv_groups: int

    def __str__(self) -> str:
        return f"{self.neurons} neurons, {self.kv_groups} KV groups"


def full_widths(anatomy: Anatomy) -> Widths:
    """The widths of the model as it is; CheckpointError for one whose layers differ."""
    found = {Widths(block.neurons, block.kv_heads) for block in anatomy.blocks}
    if len(found) > 1:
        hint = "prune a checkpoint whose layers have one width"
        raise CheckpointError(f"{anatomy.folder} has layers of different widths", hint=hint)
    return found.pop()


def kept(total: int, fraction: float) -> int:
    """How many of `total` units stay when `fraction` of them leaves; at least one does."""
    return max(1, round(total * (1 - fraction)))


def narrow(anatomy: Anatomy, widths: Widths) -> Anatomy:
    """The anatomy after pruning to `widths`; bits per weight still count the weights that left.

    Its `linear_bytes` and `file_bytes` are those of the linear weights that stay, in the checkpoint's own type. Raises
    what `refuse` does.
    """
    refuse(anatomy, widths)
    blocks = tuple(_narrow_block(block, widths) for block in anatomy.blocks)
    result = replace(anatomy, blocks=blocks, original_numel=anatomy.linear_numel)
    share = result.present_numel / anatomy.present_numel
    lost = anatomy.linear_bytes - round(anatomy.linear_bytes * share)
    return replace(result, linear_bytes=anatomy.linear_bytes - lost, file_bytes=anatomy.file_bytes - lost)


def _narrow_block(block: Block, widths: Widths) -> Block:
    heads = widths.kv_groups * (block.heads // block.kv_heads)
    shapes = {
        "q": (heads * block.head_dim, None),
        "k": (widths.kv_groups * block.head_dim, None),
        "v": (widths.kv_groups * block.head_dim, None),
        "o": (None, heads * block.head_dim),
        "gate": (widths.neurons, None),
        "up": (widths.neurons, None),
        "down": (None, widths.neurons),
    }

    def cut(matrix: Matrix) -> Matrix:
        rows, cols = shapes.get(matrix.role, (None, None))
        return replace(matrix, rows=rows or matrix.rows, cols=cols or matrix.cols)

    matrices = tuple(cut(matrix) for matrix in block.matrices)
    return replace(block, matrices=matrices, heads=heads, kv_heads=widths.kv_groups, neurons=widths.neurons)


def refuse(anatomy: Anatomy, widths: Widths) -> None:
    """RecipeError if a layer cannot have `widths`: none left, more than there are, heads that cannot leave."""
    most = full_widths(anatomy)
    for name, value, limit in (
        ("neurons", widths.neurons, most.neurons),
        ("kv_groups", widths.kv_groups, most.kv_groups),
    ):
        if not 1 <= value <= limit:
            hint = f"a layer keeps at least 1 and has {limit}"
            raise RecipeError([f"prune.{name}: {value} of {limit} cannot stay in a layer"], hint=hint)
    if widths.kv_groups < most.kv_groups and not heads_can_leave(anatomy):
        problem = f"prune.kv_groups: the heads of a {anatomy.model_type} cannot leave"
        hint = "its config.json has no head size beside the number of heads; prune neurons only"
        raise RecipeError([problem], hint=hint)


def heads_can_leave(anatomy: Anatomy) -> bool:
    """Whether the architecture can express fewer heads of the same size: not where q, k and v are one matrix."""
    return all(matrix.role != "qkv" for block in anatomy.blocks for matrix in block.matrices)


def write_config(config: Mapping[str, Any], anatomy: Anatomy, widths: Widths) -> dict[str, Any]:
    """The config.json of `anatomy`'s checkpoint, whose own is `config`, after pruning to `widths`.

    RecipeError if there is no way to write it: heads that do not divide the hidden size of a Llama with biases, which
    Mistral does not have.
    """
    block = anatomy.blocks[0]
    result = dict(config)
    if widths.neurons != block.neurons:
        result["n_inner" if "n_embd" in config else "intermediate_size"] = widths.neurons
    if widths.kv_groups != block.kv_heads:
        heads = widths.kv_groups * (block.heads // block.kv_heads)
        # Always written out: its default is derived from the number of heads.
        result |= {
            "num_attention_heads": heads,
            "num_key_value_heads": widths.kv_groups,
            "head_dim": block.head_dim,
        }
        if config.get("model_type") == "llama" and anatomy.hidden % heads:
            _become_mistral(result, anatomy, heads)
    result[KEY] = {"linear_numel": anatomy.linear_numel, "neurons": block.neurons, "kv_groups": block.kv_heads}
    return result


def _become_mistral(config: dict[str, Any], anatomy: Anatomy, heads: int) -> None:
    if config.get("attention_bias") or config.get("mlp_bias"):
        problem = f"prune.kv_groups: Llama takes no {heads} heads at hidden size {anatomy.hidden}"
        hint = "with biases it cannot be written as Mistral either: keep a number of heads that divides the hidden size"
        raise RecipeError([problem], hint=hint)
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    # Where the two have different defaults, Llama's.
    config.setdefault("intermediate_size", anatomy.blocks[0].neurons)
    config.setdefault("max_position_embeddings", 2048)
    # transformers 4.57 and older wrote Mistral tokenizers with a wrong pattern, and a newer one warns of files that
    # do not say they are newer. This tokenizer is not one of them.
    config["transformers_version"] = "5.0.0"
