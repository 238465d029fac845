"""Atomic writes: readers see the old file or the whole new one, and nothing else is left in the folder."""

import errno
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from circuitpress.errors import CircuitpressError
from circuitpress.files import atomic, sha256, write_bytes_atomic


def test_new_folders_and_old_files(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    write_bytes_atomic(path, b"one")
    write_bytes_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_inside_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="mine"), atomic(path) as partial:
        partial.write_bytes(b"half of the new")
        raise ValueError("mine")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_full_disk_is_told(tmp_path: Path, number: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(CircuitpressError, match=f"cannot write {path}: {os.strerror(number)}") as caught, atomic(path):
        raise OSError(number, os.strerror(number))
    assert caught.value.hint is not None
    assert "--out" in caught.value.hint
    assert path.read_bytes() == b"old"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CircuitpressError, match="cannot write .*file/inside"):
        write_bytes_atomic(tmp_path / "file" / "inside", b"x")


WRITE_FOR_EVER = """
import itertools, pathlib, sys
from circuitpress.files import write_bytes_atomic
for number in itertools.count():
    write_bytes_atomic(pathlib.Path(sys.argv[1]), bytes([65 + number % 26]) * 300_000)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for attempt in range(4):
        writer = subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, str(path)])
        while not path.exists():
            assert writer.poll() is None
            time.sleep(0.01)
        time.sleep(0.02 + 0.013 * attempt)
        writer.kill()
        writer.wait()
        content = path.read_bytes()
        assert len(content) == 300_000
        assert len(set(content)) == 1
        # What a killed writer leaves does not hinder the next one.
        write_bytes_atomic(path, b"next")
        assert path.read_bytes() == b"next"
        path.unlink()


def test_digests(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for size in (0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1):
        data = os.urandom(size)
        path.write_bytes(data)
        assert sha256(path) == hashlib.sha256(data).hexdigest()
