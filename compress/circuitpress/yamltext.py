"""YAML read strictly: safe types only, a key that appears twice is an error, and every error shows its line."""

from collections.abc import Hashable
from typing import Any

import yaml

from .errors import RecipeError


class _StrictLoader(yaml.SafeLoader):
    """safe_load that refuses a key which appears twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[object, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float)) and key in seen:
                message = f"the key {key!r} appears twice, first in line {seen[key]}"
                raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
            if isinstance(key, (str, int, float)):
                seen[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep=deep)


def read_yaml(text: str, name: str) -> object:
    """What a YAML text says; RecipeError shows the line that is wrong. `name` stands for the text in messages."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 (a subclass of SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        lines = text.splitlines()
        shown = f"\n  {lines[mark.line]}\n  {' ' * mark.column}^" if mark and mark.line < len(lines) else ""
        raise RecipeError([f"{where}: {error.problem}{shown}"], hint="fix this line of the recipe") from error
    except yaml.YAMLError as error:
        raise RecipeError([f"{name}: not YAML: {error}"], hint="write it as YAML: `key: value` lines") from error
