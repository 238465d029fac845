"""Targets: what the runtime of a model can hold, as groups, options and bytes of a plan.

| target | formats | one decision for | beside that |
|---|---|---|---|
| native | all | whatever was priced | |
| dense | all | whatever was priced | exported as the 16-bit numbers that the codes stand for |
| compressed-tensors | sym4, sym8, floating | q, k, v together; gate, up together | the rules of `serving` |
| bitsandbytes | nf4 or llmint8, floating | a matrix | nf4 needs 64 to divide the columns |
| gguf | those of `TENSOR_TYPES`, floating | a matrix | blocks of 256 or 32 divide the columns |

1. `menu.refuse_formats` compares what is on offer with the target's formats, before anything is computed.
2. `fit` merges groups that must share a decision and counts bytes as the runtime stores them.
3. `target_rules` forbids what a matrix's shape does not admit: a mask like any other.
4. `plan_problems` checks finished decisions, whoever made them.

llama.cpp rounds the weights itself. For gguf, our formats stand in for its types: the same number of bits, blocks and
kind of grid, and every weight rounded to its nearest code (`price` without feedback), as llama.cpp does. So prices say
which matrices need more bits, and KL what to expect.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import RecipeError
from ..menu import FLOATING, TARGET_FORMATS
from ..units import OUTER, Group, Prices, Segment
from .constraints import Constraint
from .serving import Stored, fused_name, grid_of, vllm_problems

NF4_BLOCK = 64


@dataclass(frozen=True)
class TensorType:
    """A type of llama.cpp: `block` weights in `nbytes` bytes; `small` takes its place where 256 does not divide."""

    name: str
    block: int
    nbytes: int
    small: "TensorType | None" = None


IQ4_NL = TensorType("iq4_nl", 32, 18)
Q5_0 = TensorType("q5_0", 32, 22)
TENSOR_TYPES = {
    "int2g16": TensorType("q2_k", 256, 84),
    "sym3g16": TensorType("q3_k", 256, 110),
    "int4g32": TensorType("q4_k", 256, 144, IQ4_NL),
    "int5g32": TensorType("q5_k", 256, 176, Q5_0),
    "sym6g16": TensorType("q6_k", 256, 210),
    "sym8g32": TensorType("q8_0", 32, 34),
    "float16": TensorType("f16", 1, 2),
    "bfloat16": TensorType("bf16", 1, 2),
    "float32": TensorType("f32", 1, 4),
}
"""By the format that stands in for it. Sizes are those of ggml-common.h (block_q2_K, ...). IQ4_NL rather than Q4_0,
which is as large: with it the KL of three plans was 23, 10 and 2 % smaller (stories260K, lab-llama-14m, demo-llama)."""


def rounded_here(target: str) -> bool:
    """Whether weights for `target` are rounded here, each for the errors of others, and not by the runtime itself."""
    return target != "gguf"


def tensor_type(form: str, cols: int) -> TensorType | None:
    """The type that llama.cpp gives a matrix with `cols` columns; None if its blocks do not divide them."""
    kind = TENSOR_TYPES.get(form)
    while kind is not None and cols % kind.block:
        kind = kind.small
    return kind


def fit(prices: Prices, target: str) -> Prices:
    """`prices` with the groups and bytes of `target`. RecipeError if matrices were priced in parts."""
    if target not in TARGET_FORMATS:
        return prices
    if part := next((group.name for group in prices.groups if not _is_whole(group)), None):
        problem = f"plan.granularity: {target} holds one format a matrix, and {part} was priced in parts"
        raise RecipeError([problem], hint="score with plan.granularity=matrix")
    merged: dict[str, list[int]] = {}
    for i, group in enumerate(prices.groups):
        name = fused_name(group.name) if target == "compressed-tensors" else group.name
        merged.setdefault(name, []).append(i)
    rows = list(merged.values())
    groups = tuple(_merge(name, [prices.groups[i] for i in own]) for name, own in merged.items())
    nbytes = [
        [sum(_bytes(target, form, prices.groups[i].segments[0], int(prices.nbytes[i, f])) for i in own)
         for f, form in enumerate(prices.formats)]
        for own in rows
    ]  # fmt: skip
    sums = {name: np.array([getattr(prices, name)[own].sum(0) for own in rows]) for name in ("nats", "nats_sequence")}
    stderr = np.array([np.sqrt(np.square(prices.stderr[own]).sum(0)) for own in rows])
    return replace(prices, groups=groups, nbytes=np.array(nbytes, dtype=np.int64), stderr=stderr, **sums)


def target_rules(prices: Prices, target: str) -> list[Constraint]:
    """The mask of what each group may take in `target`; nothing for a target that holds everything."""
    if target not in TARGET_FORMATS:
        return []
    allowed = [
        [all(option_problem(target, form, segment, outer=group.layer == OUTER) is None for segment in group.segments)
         for form in prices.formats]
        for group in prices.groups
    ]  # fmt: skip
    return [Constraint("target", f"what {target} can hold of each shape", allowed=np.array(allowed, dtype=np.bool_))]


def option_problem(target: str, form: str, matrix: Segment, *, outer: bool = False) -> str | None:
    """Why `target` cannot hold a whole matrix in the complete format `form`; None if it can."""
    if target not in TARGET_FORMATS or (re.fullmatch(FLOATING, form) and target != "gguf"):
        return None
    name, cols = matrix.module, matrix.cols
    if outer:
        return f"{name}: {target} keeps embedding and lm_head at 16 bits" if not re.fullmatch(FLOATING, form) else None
    if not re.fullmatch(TARGET_FORMATS[target], form):
        return f"{name}: {target} has no {form}"
    if target == "bitsandbytes":
        odd = form == "nf4" and cols % NF4_BLOCK != 0
        return f"{name}: blocks of {NF4_BLOCK} do not divide its {cols} columns" if odd else None
    if target == "gguf":
        none = tensor_type(form, cols) is None
        return f"{name}: no type of llama.cpp for {form} has blocks that divide {cols} columns" if none else None
    return next(iter(vllm_problems({name: Stored((form,), matrix.rows, cols)})), None)


def plan_problems(target: str, modules: Mapping[str, Stored]) -> list[str]:
    """Why `target` cannot hold the matrices of decoder blocks as they are stored; empty if it can."""
    if target not in TARGET_FORMATS:
        return []
    problems = []
    for name, stored in modules.items():
        first, *others = stored.formats
        if others:
            formats = " and ".join(dict.fromkeys(stored.formats))
            problems.append(f"{name}: is stored in {len(stored.formats)} parts ({formats}), {target} has one a matrix")
        elif problem := option_problem(target, first, Segment(name, "rows", 0, stored.rows, stored.rows, stored.cols)):
            problems.append(problem)
    if target == "compressed-tensors":
        problems += [problem for problem in vllm_problems(modules) if problem not in problems]
    kinds = {stored.formats[0] for stored in modules.values()} & {"nf4", "llmint8"}
    if target == "bitsandbytes" and len(kinds) == 2:
        problems.append("nf4 and llmint8 are both there: transformers reads one of them from a folder")
    return problems


def _is_whole(group: Group) -> bool:
    return len(group.segments) == 1 and group.segments[0].module == group.name and group.segments[0].axis == "rows"


def _merge(name: str, groups: Sequence[Group]) -> Group:
    segments = tuple(segment for group in groups for segment in group.segments)
    units = tuple(dict.fromkeys(unit for group in groups for unit in group.units))
    return Group(name, groups[0].layer, segments, units)


def _bytes(target: str, form: str, matrix: Segment, nbytes: int) -> int:
    """What the runtime stores for a matrix; `nbytes` if it is not known to differ from what we store."""
    floating = re.fullmatch(FLOATING, form)
    return nbytes if floating else _STORED[target](form, matrix, nbytes)


def _compressed_tensors_bytes(form: str, matrix: Segment, nbytes: int) -> int:
    if (grid := grid_of(form)) is None:
        return nbytes
    bits, group = grid
    words = math.ceil(matrix.cols * bits / 32)
    scales = math.ceil(matrix.cols / (group or matrix.cols))
    return matrix.rows * (4 * words + 2 * scales) + 16  # and two int64 for the shape


def _bitsandbytes_bytes(form: str, matrix: Segment, nbytes: int) -> int:
    del matrix
    return nbytes + {"nf4": 4 * 16 + 90, "llmint8": 1}.get(form, 0)  # the levels and a line of JSON; the layout


def _gguf_bytes(form: str, matrix: Segment, nbytes: int) -> int:
    kind = tensor_type(form, matrix.cols)
    return nbytes if kind is None else matrix.rows * (matrix.cols // kind.block) * kind.nbytes


_STORED: dict[str, Callable[[str, Segment, int], int]] = {
    "compressed-tensors": _compressed_tensors_bytes,
    "bitsandbytes": _bitsandbytes_bytes,
    "gguf": _gguf_bytes,
}
