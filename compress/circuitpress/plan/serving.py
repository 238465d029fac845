"""vLLM's rules for models in the compressed-tensors format, each with the check that holds it.

Read from vLLM's source (https://github.com/vllm-project/vllm, vllm/model_executor/layers/quantization: the folder
compressed_tensors with schemes/compressed_tensors_wNa16.py and utils.py, and utils/marlin_utils.py). vLLM answers a
breach with an error after minutes of loading; here it is one line of a plan.

Rules that are `advice` are about speed: a kernel of vLLM wants shapes that small models do not have, stock transformers
loads such a model all the same.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""The matrices that vLLM lays into one (`packed_modules_mapping` of Llama, Mistral, Qwen2 and Qwen3)."""

_SYM = re.compile(r"sym([2-8])(?:g([1-9]\d*)|c)")


@dataclass(frozen=True)
class Stored:
    """A matrix [rows, cols] and the complete formats of its parts."""

    formats: tuple[str, ...]
    rows: int
    cols: int


Modules = Mapping[str, Stored]


@dataclass(frozen=True)
class Rule:
    """One rule: its name, what it says, where vLLM has it, and `check`, which returns a line for every breach."""

    name: str
    says: str
    where: str
    check: Callable[[Modules], list[str]]
    advice: bool = False


def fused_name(module: str) -> str:
    """The name under which vLLM keeps a matrix: `...self_attn.q_proj` becomes `...self_attn.qkv_proj`."""
    parent, _, own = module.rpartition(".")
    fused = next((name for name, parts in FUSED.items() if own in parts), own)
    return f"{parent}.{fused}" if parent else fused


def grid_of(form: str) -> tuple[int, int] | None:
    """Bits and group size (0: a row) of a symmetric integer format; None for other formats."""
    match = _SYM.fullmatch(form)
    return None if match is None else (int(match[1]), int(match[2] or 0))


def vllm_problems(modules: Modules, *, advice: bool = False) -> list[str]:
    """The breaches of all rules, or of those that are only `advice`."""
    return [line for rule in RULES if rule.advice == advice for line in rule.check(modules)]


def _one_format(modules: Modules) -> list[str]:
    return [
        f"{name}: holds {' and '.join(stored.formats)}, vLLM has one scheme a matrix"
        for name, stored in modules.items()
        if len(set(stored.formats)) > 1
    ]


def _fused(modules: Modules) -> list[str]:
    groups: dict[str, dict[str, str]] = {}
    for name, stored in modules.items():
        groups.setdefault(fused_name(name), {})[name.rpartition(".")[2]] = stored.formats[0]
    return [
        f"{name}: {', '.join(f'{part} is {form}' for part, form in parts.items())}; vLLM lays them into one matrix "
        "and refuses different schemes"
        for name, parts in groups.items()
        if len(set(parts.values())) > 1
    ]


def _symmetric(modules: Modules) -> list[str]:
    return [
        f"{name}: {form} is no symmetric integer grid" for name, form, _ in _packed(modules) if grid_of(form) is None
    ]


def _bits(modules: Modules) -> list[str]:
    return [
        f"{name}: {form} has {grid[0]} bits, vLLM has kernels for 4 and 8"
        for name, form, _ in _packed(modules)
        if (grid := grid_of(form)) and grid[0] not in (4, 8)
    ]


def _group_size(modules: Modules) -> list[str]:
    return [
        f"{name}: {form} has groups of {grid[1]}, vLLM has kernels for 32, 64, 128 and whole rows"
        for name, form, _ in _packed(modules)
        if (grid := grid_of(form)) and grid[1] not in (0, 32, 64, 128)
    ]


def _divides(modules: Modules) -> list[str]:
    return [
        f"{name}: groups of {grid[1]} do not divide its {stored.cols} columns"
        for name, form, stored in _packed(modules)
        if (grid := grid_of(form)) and grid[1] and stored.cols % grid[1]
    ]


def _words(modules: Modules) -> list[str]:
    return [
        f"{name}: {stored.cols} columns of {grid[0]} bits do not fill words of 32 bits"
        for name, form, stored in _packed(modules)
        if (grid := grid_of(form)) and stored.cols * grid[0] % 32
    ]


def _tiles(modules: Modules) -> list[str]:
    rows: dict[str, int] = {}
    for name, _, stored in _packed(modules):
        rows[fused_name(name)] = rows.get(fused_name(name), 0) + stored.rows
    seen = {fused_name(name): stored.cols for name, _, stored in _packed(modules)}
    return [
        f"{name}: {rows[name]} x {cols}, the Marlin kernel takes multiples of 64 x 128"
        for name, cols in seen.items()
        if rows[name] % 64 or cols % 128
    ]


def _packed(modules: Modules) -> list[tuple[str, str, Stored]]:
    """The matrices that are not floating, with their format."""
    floating = ("float16", "bfloat16", "float32")
    return [(name, stored.formats[0], stored) for name, stored in modules.items() if stored.formats[0] not in floating]


RULES = (
    Rule("one-format", "a matrix has one scheme", "compressed_tensors.py: get_scheme", _one_format),
    Rule(
        "fused", "q, k, v share a scheme; so do gate, up", "utils.py: should_ignore_layer, _match_fused_layer", _fused
    ),
    Rule("symmetric", "weights without activations are symmetric integers", "compressed_tensors.py", _symmetric),
    Rule("bits", "4 or 8 bits", "compressed_tensors_wNa16.py: WNA16_SUPPORTED_TYPES_MAP", _bits),
    Rule("group-size", "groups of 32, 64, 128 or a row", "marlin_utils.py: MARLIN_SUPPORTED_GROUP_SIZES", _group_size),
    Rule("divides", "groups divide the columns", "marlin_utils.py: verify_marlin_supports_shape", _divides),
    Rule("words", "codes fill 32-bit words", "compressed_tensors_wNa16.py: PackedvLLMParameter", _words),
    Rule(
        "tiles", "64 divides outputs, 128 inputs", "marlin_utils.py: verify_marlin_supports_shape", _tiles, advice=True
    ),
)
"""Two more need no check, since the export cannot break them: scales are numbers of the type that the model computes in
(formats/integer.py), and every linear layer that is not packed is in `ignore` (export/packed.py)."""
