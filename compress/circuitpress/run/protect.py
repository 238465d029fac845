"""Protected parts and pruning: what may not leave, and what it is called afterwards.

`plan.protect` names parts of the original. Pruning must keep them, and numbers the units that stay anew, so the
patterns are turned into names of the pruned model before anything is planned on it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from ..anatomy import Anatomy, Block
from ..errors import RecipeError
from ..units import UnitId
from ..widths import Widths

Stay = Mapping[int, Mapping[str, Sequence[int]]]
"""By layer and kind (`neuron`, `kv_group`) the units that stay, ascending."""

_ROLES = {"neuron": ("gate", "up", "down"), "kv_group": ("q", "k", "v", "qkv", "o")}


def protected_units(anatomy: Anatomy, patterns: Sequence[str]) -> frozenset[UnitId]:
    """The neurons and key-value groups that `patterns` forbid to prune.

    A protected layer or module keeps all units whose weights it holds, a protected head its whole group.
    """
    return frozenset(
        _owner(block, unit)
        for block in anatomy.blocks
        for unit in block.units()
        if any(_hits(pattern, _names(block, unit)) for pattern in patterns)
    )


def refuse_too_narrow(anatomy: Anatomy, widths: Widths, keep: frozenset[UnitId]) -> None:
    """RecipeError if more units of a layer are protected than `widths` leave in it."""
    for kind, name, width in (("neuron", "neurons", widths.neurons), ("kv_group", "kv_groups", widths.kv_groups)):
        for block in anatomy.blocks:
            count = sum(unit.layer == block.index and unit.kind == kind for unit in keep)
            if count > width:
                problem = f"prune.{name}: layer {block.index} would keep {width}, and {count} are protected"
                raise RecipeError([problem], hint="prune less, or protect less: all layers have one width")


def translate(patterns: Sequence[str], anatomy: Anatomy, stay: Stay) -> tuple[str, ...]:
    """`patterns` for the pruned model: names of units become those that they have there.

    `anatomy` is the original's. Layers and modules keep their names.
    """
    result: list[str] = []
    for pattern in patterns:
        units = [unit for block in anatomy.blocks for unit in block.units() if _hits(pattern, {str(unit)})]
        moved = [str(_moved(unit, anatomy.blocks[unit.layer], stay[unit.layer])) for unit in units]
        result += moved or [pattern]
    return tuple(dict.fromkeys(result))


def _owner(block: Block, unit: UnitId) -> UnitId:
    if unit.kind != "head":
        return unit
    return UnitId(unit.layer, "kv_group", unit.index // (block.heads // block.kv_heads))


def _moved(unit: UnitId, block: Block, stay: Mapping[str, Sequence[int]]) -> UnitId:
    if unit.kind != "head":
        return replace(unit, index=list(stay[unit.kind]).index(unit.index))
    share = block.heads // block.kv_heads
    group = list(stay["kv_group"]).index(unit.index // share)
    return replace(unit, index=group * share + unit.index % share)


def _names(block: Block, unit: UnitId) -> set[str]:
    roles = _ROLES["neuron" if unit.kind == "neuron" else "kv_group"]
    return {str(unit), f"L{unit.layer}"} | {matrix.module for matrix in block.matrices if matrix.role in roles}


def _hits(pattern: str, names: set[str]) -> bool:
    return pattern in names or any(fnmatchcase(name, pattern) for name in names)
