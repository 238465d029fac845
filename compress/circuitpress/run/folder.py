"""The run folder: whose it is, who works in it, what it was made from, which stages are finished.

1. A folder is ours when it holds our manifest.json. An existing folder with anything else in it is refused before
   anything is written, so a wrong `--out` never mixes with somebody's files; `--restart` removes only names of ours.
2. One process at a time holds the lock, a `flock` on `.lock`. The kernel drops it when the process dies, however it
   dies, so nothing stale is left after `kill -9`.
3. The manifest's fingerprints say what the run was made from. A rerun with another input stops and names the field.
4. The manifest's journal says which stages are finished. It is rewritten atomically after each, and a stage counts only
   if its files are still there.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..console import size
from ..errors import CircuitpressError
from ..files import write_bytes_atomic

PROGRAM = "circuitpress"
OURS = (
    "manifest.json", "recipe.yaml", "run.log", "anatomy.json", "prune.json", "pruned", "pruning",
    "scores.safetensors", "scores.json", "prices.safetensors", "prices.json", "pricing", "exact.json", "probes.json",
    "outer.safetensors", "outer.json", "swaps.json", "refine.json", "plan.json", "pareto.json", "shards",
    "spill", "windows", "behaviors.json", "pricing-behaviors", "pricing-features", "model", "evaluate", "report.html",
)  # fmt: skip
"""Everything that a run writes, except the lock."""


@dataclass
class RunFolder:
    """An open run folder; made by `open_folder`, which holds the lock while it is used."""

    path: Path
    fingerprints: dict[str, Any] = field(default_factory=dict)
    journal: dict[str, float] = field(default_factory=dict)
    """Finished stages in order, with the seconds that each took."""

    @property
    def holds_work(self) -> bool:
        """Whether anything was computed here that would be lost: a stage after `check`, or a priced block."""
        return bool(set(self.journal) - {"check"}) or any((self.path / "pricing").glob("block-*"))

    def save(self) -> None:
        """Writes manifest.json."""
        document = {
            "program": PROGRAM,
            "version": __version__,
            "fingerprints": self.fingerprints,
            "journal": self.journal,
        }
        write_bytes_atomic(self.path / "manifest.json", (json.dumps(document, indent=1) + "\n").encode())

    def is_finished(self, stage: str, files: Iterable[str]) -> bool:
        """Whether the journal names the stage and all of its files are there."""
        return stage in self.journal and all((self.path / name).exists() for name in files)

    def finish(self, stage: str, seconds: float) -> None:
        """Enters a stage in the journal."""
        self.journal[stage] = round(seconds, 3)
        self.save()

    def forget(self, *stages: str) -> None:
        """Takes stages out of the journal, so that they run again."""
        for stage in stages:
            self.journal.pop(stage, None)
        self.save()


@contextlib.contextmanager
def open_folder(path: Path, *, create: bool, restart: bool = False) -> Iterator[RunFolder]:
    """The run folder at `path`, locked while the context lasts.

    `create` makes it if there is none; `restart` first removes everything that an earlier run wrote. Raises
    CircuitpressError if the folder belongs to something else, is in use, is missing, or cannot be written.
    """
    refuse_foreign(path)
    if not path.exists() and not create:
        raise CircuitpressError(f"{path}: no such run folder", hint="make one: circuitpress score MODEL --out DIR")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CircuitpressError(f"cannot use {path}: {error.strerror}", hint="pass another --out") from error
    try:
        _take(lock, path)
        if not create and not (path / "manifest.json").exists():
            raise CircuitpressError(
                f"{path} is not a run folder: it has no manifest.json",
                hint="make one: circuitpress score MODEL --out DIR",
            )
        if restart:
            clear(path, OURS)
        yield _load(path)
    finally:
        os.close(lock)


def clear(path: Path, names: Iterable[str]) -> None:
    """Removes files and folders of a run by name; those that are not there are no problem."""
    for name in names:
        target = path / name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)


def refuse_foreign(path: Path) -> None:
    """Raises CircuitpressError if `path` exists and is not a run folder of ours; changes nothing."""
    if not path.exists():
        return
    if not path.is_dir():
        raise CircuitpressError(f"{path} is a file, not a run folder", hint="pass another --out")
    manifest = path / "manifest.json"
    if manifest.exists():
        try:
            document = json.loads(manifest.read_text())
        except (ValueError, OSError) as error:
            raise CircuitpressError(
                f"{manifest} cannot be read: {error}", hint="pass another --out, or remove the folder"
            ) from error
        if isinstance(document, dict) and document.get("program") == PROGRAM:
            return
        stranger = "manifest.json of another program"
    else:
        # A run that was killed in its first moments leaves a lock, a log and a partial file.
        others = (p.name for p in path.iterdir() if p.name not in (".lock", "run.log") and ".partial-" not in p.name)
        stranger = next(others, None)
    if stranger is not None:
        raise CircuitpressError(
            f"{path} exists and is not a run of circuitpress: it holds {stranger}",
            hint="pass another --out; nothing was changed there",
        )


def _take(lock: int, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(lock, 64, 0).decode(errors="replace").strip() or "unknown"
        raise CircuitpressError(
            f"{path} is in use by another circuitpress (process {holder})",
            hint="wait for it, or pass another --out",
        ) from error
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)


def _load(path: Path) -> RunFolder:
    manifest = path / "manifest.json"
    if not manifest.exists():
        return RunFolder(path)
    document = json.loads(manifest.read_text())
    return RunFolder(path, document["fingerprints"], document["journal"])


@contextlib.contextmanager
def full_disk_is_an_error(path: Path) -> Iterator[None]:
    """Turns the failures of a full disk, which come in several shapes, into one message that names the folder."""
    try:
        yield
    except Exception as error:
        if isinstance(error, CircuitpressError) or not _is_full(error, path):
            raise
        raise CircuitpressError(
            f"the disk of {path} is full: {size(free_bytes(path))} are free",
            hint="free some space, then run the same command again: finished stages are kept",
        ) from error


def _is_full(error: BaseException, path: Path) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors and torch wrap the errno in a string; numpy's tofile says "N requested and M written" without one.
    text = str(error)
    return "No space left" in text or ("requested and" in text and "written" in text and free_bytes(path) < 1 << 24)


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of `path`, or of its nearest parent that exists."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_space(path: Path, needed: int, parts: Mapping[str, int]) -> None:
    """Raises CircuitpressError, naming the largest parts, if fewer than `needed` bytes are free for `path`."""
    free = free_bytes(path)
    if free < needed:
        listed = ", ".join(f"{name} {size(nbytes)}" for name, nbytes in parts.items())
        raise CircuitpressError(
            f"{path} needs about {size(needed)} ({listed}), {size(free)} are free on its disk",
            hint="free some space, or pass an --out on another disk",
        )
