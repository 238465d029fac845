"""How kernels are launched: the table of what was measured, and what is taken where nothing was.

1. A situation is a GPU by name, the formats of a matrix, the rows of activations (up to 8, or up to 32) and the size of
   the matrix to the next power of two. For each the table may hold a launch.
2. Tables are json files: one beside this module, with launches measured by the authors (there are none yet), and one in
   the user's cache folder, which `circuitpress bench kernels MODEL --tune` writes and which comes first.
3. Elsewhere launches are the ones that machine code speaks for: as many warps and stages as spill no registers.

`programs` counts when a matrix is laid out, for few rows of activations; warps and stages count at every launch.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .slices import SPARSE

REGIMES = (8, 32)
"""Rows of activations that a situation reaches up to."""
FILE = "CIRCUITPRESS_LAUNCHES"
"""The environment variable that names another file than the one in the cache folder."""


class Launch(NamedTuple):
    """Programs for each multiprocessor, warps of a program, stages of its pipeline."""

    programs: int
    warps: int
    stages: int


class Situation(NamedTuple):
    """What a launch is chosen by."""

    device: str
    kinds: int
    """Bit k is set if there are pieces of kind k, other than scattered ones"""
    rows: int
    """One of REGIMES"""
    size: int
    """The bits of the number of weights"""


_FORCED: ContextVar[Launch | None] = ContextVar("forced launch", default=None)


def default(kinds: int, *, hip: bool = False) -> Launch:
    """The launch that nobody measured.

    Six programs are as many as a multiprocessor's registers and shared memory hold at once, at 128 registers a thread.
    A superblock of 3 bits is large (28 kB with its activations) and takes 182 registers: a third stage would spill.
    """
    return Launch(6, 4 if hip else 2, 2 if hip or kinds >> 3 & 1 else 3)


def choose(device: str, kinds: int, *, rows: int, weights: int, hip: bool = False) -> Launch:
    """The launch for `rows` rows of activations and a matrix of `weights` weights on the GPU `device`."""
    forced = _FORCED.get()
    if forced is not None:
        return forced
    return tables().get(situation(device, kinds, rows=rows, weights=weights)) or default(kinds, hip=hip)


def situation(device: str, kinds: int, *, rows: int, weights: int) -> Situation:
    """The situation that a product is in. Scattered pieces make none of their own: they are few."""
    return Situation(
        device, kinds & ~(1 << SPARSE), REGIMES[0] if rows <= REGIMES[0] else REGIMES[1], weights.bit_length()
    )


@contextmanager
def forced(launch: Launch) -> Iterator[None]:
    """Chooses `launch` for whatever happens inside."""
    token = _FORCED.set(launch)
    try:
        yield
    finally:
        _FORCED.reset(token)


@cache
def tables() -> dict[Situation, Launch]:
    """All launches that were measured: those of the user, else those of the package. Read once a process."""
    return read(Path(__file__).with_name("launches.json")) | read(user_file())


def read(path: Path) -> dict[Situation, Launch]:
    """The launches of one file, none if it does not exist; ValueError for a file that is no such table."""
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text())["launches"]
        return {
            Situation(*(row[name] for name in Situation._fields)): Launch(*(int(row[name]) for name in Launch._fields))
            for row in rows
        }
    except (ValueError, KeyError, TypeError) as error:
        message = f"{path} is no table of launches ({error!r}); delete it, or run `circuitpress bench kernels --tune`"
        raise ValueError(message) from error


def rows_of(found: Mapping[Situation, Launch]) -> list[dict[str, Any]]:
    """What `read` reads, for a file `{"launches": rows}`."""
    return [situation._asdict() | launch._asdict() for situation, launch in found.items()]


def user_file() -> Path:
    """Where the user's launches are, under the platform's folder for caches."""
    if FILE in os.environ:
        return Path(os.environ[FILE])
    if sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA", Path.home()))
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "circuitpress" / "launches.json"
