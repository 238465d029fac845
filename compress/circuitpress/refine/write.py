"""Puts refined tensors into a packed model folder: a new folder beside it, renamed when it is whole."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ..files import atomic, write_bytes_atomic

RECORD = "refine.json"
"""Lies in a refined model folder and says what refinement did; its presence marks the folder as refined."""


def write_refined(folder: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Replaces `tensors` (by stored name) in the files of `folder` and adds `record`; the folder changes at once.

    Files without changes are linked, not copied.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    left = set(tensors)
    for source in sorted(folder.iterdir()):
        if source.name == RECORD:
            continue
        if source.suffix != ".safetensors":
            shutil.copy2(source, partial / source.name)
            continue
        with safe_open(source, framework="pt") as file:
            names = set(file.keys())
        if left & names:
            content = load_file(source)
            for name in left & names:
                content[name] = _alike(name, content[name], tensors[name])
            write_bytes_atomic(partial / source.name, save(content, metadata={"format": "pt"}))
        else:
            _link(source, partial / source.name)
        left -= names
    if left:
        raise ValueError(f"{folder} stores no tensor {', '.join(sorted(left))}")
    write_bytes_atomic(partial / RECORD, (json.dumps(record, indent=1) + "\n").encode())
    shutil.rmtree(folder)
    partial.replace(folder)


def _alike(name: str, old: Tensor, new: Tensor) -> Tensor:
    if old.shape != new.shape or old.dtype != new.dtype:
        raise ValueError(f"{name} was {old.dtype} {list(old.shape)}, is {new.dtype} {list(new.shape)}")
    return new


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        with atomic(target) as path:
            shutil.copyfile(source, path)
