"""The kinds of values that a recipe holds, each with the check that says what is wrong with one. No torch here."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, StringConstraints

from .menu import FORMAT, NAMES, OUTER_FORMAT

BUDGET = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(bpw|%|[kMG]?B|[KMG]iB|[um]s@batch\d+)")


def _check_budget(value: object) -> str:
    match = BUDGET.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or float(match[1]) <= 0:
        raise ValueError(
            "not a budget: write bits per weight, percent, bytes or time, such as 3.0bpw, 40%, 900MB or 12ms@batch1"
        )
    return match[0]


def _check_format(name: str) -> str:
    if FORMAT.fullmatch(name) is None:
        raise ValueError(f"not a format: there are {NAMES}")
    return name


def _check_probe(name: str) -> str:
    return _check_budget(name) if re.fullmatch(r"[\d.]+ *bpw", name) else _check_format(name)


def _check_outer(name: str) -> str:
    if name != "auto" and not OUTER_FORMAT.fullmatch(name):
        raise ValueError("not for embedding and lm_head: they take auto, int2 to int8 (int4g32), float16, ..., dense")
    return name


def _check_uniform(heterogeneous: bool) -> bool:
    if heterogeneous:
        raise ValueError("layers of different widths cannot be written: transformers reads one width for all of them")
    return heterogeneous


def _check_file(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    return path


def _check_there(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"no such file or folder: {path}")
    return path


def _check_folder(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(f"no such folder: {path}")
    return path


def _check_model(model: str) -> str:
    """What is neither a folder nor looks like a path is taken for a Hub id[@revision]."""
    if Path(model).exists() or re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(@[\w./-]+)?", model):
        return model
    raise ValueError(f"no such folder: {model}")


Budget = Annotated[str, BeforeValidator(_check_budget)]
FormatName = Annotated[str, AfterValidator(_check_format)]
OfferName = Annotated[str, AfterValidator(lambda name: name if name == "drop" else _check_format(name))]
ProbeName = Annotated[str, AfterValidator(_check_probe)]
OuterName = Annotated[str, AfterValidator(_check_outer)]
LocalFile = Annotated[Path, AfterValidator(_check_file)]
LocalPath = Annotated[Path, AfterValidator(_check_there)]
LocalFolder = Annotated[Path, AfterValidator(_check_folder)]
Uniform = Annotated[bool, AfterValidator(_check_uniform)]
ModelName = Annotated[str, AfterValidator(_check_model)]
UnitName = Annotated[str, StringConstraints(min_length=1)]
