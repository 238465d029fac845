"""Keeps what C code prints out of standard output, where `--json` promises one document and nothing else.

HiGHS (in scipy 1.17) prints a line of debugging with `printf` in about one branch-and-bound run out of ten, whatever
its options say. C buffers it, so it has to be flushed while the descriptor still leads nowhere.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def silent_stdout() -> Iterator[None]:
    """Sends file descriptor 1 of this process, for all its threads, nowhere while the context lasts."""
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    libc = ctypes.CDLL(None)
    if sys.stdout is not None:
        sys.stdout.flush()
    libc.fflush(None)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(nowhere)
        os.close(kept)
