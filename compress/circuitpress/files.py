"""Writing files so that a crash, a full disk or `kill -9` never leaves half of one."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import CircuitpressError


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary name in the folder of `path`; on success it is synced and renamed to `path`, else removed.

    OSError (a full disk, a read-only folder) becomes a CircuitpressError that names the path.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        hint = "free some space or pass another --out, then run the same command again: finished stages are kept"
        raise CircuitpressError(f"cannot write {path}: {error.strerror or error}", hint=hint) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Writes `data` to `path` so that readers see the old file or the whole new one."""
    with atomic(path) as partial:
        partial.write_bytes(data)


def sha256(path: Path) -> str:
    """The hex digest of a file's content, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
