"""Hidden states between blocks: in memory up to a limit, then in files that are read back one at a time."""

import contextlib
import ctypes
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Key = tuple[int | str, ...]

FREED = 1 << 29
"""Bytes of freed memory that glibc may keep."""


class Store:
    """Tensors by key. Those beyond `limit` bytes go to `folder` (kept in memory if it is None).

    Files hold raw numbers and never outlive the process on purpose: a resumed run recomputes them, which costs one
    forward pass and saves every question about their age.
    """

    def __init__(self, folder: Path | None, *, limit: int = 1 << 29) -> None:
        self._folder = folder
        self.limit = limit
        self._resident = 0
        self._written = 0
        self._memory: dict[Key, Tensor] = {}
        self._files: dict[Key, tuple[Path, torch.dtype, torch.Size]] = {}

    def put(self, key: Key, tensor: Tensor) -> None:
        """Keeps `tensor` under `key`, replacing what was there."""
        self.drop(key)
        tensor = tensor.detach()
        size = tensor.numel() * tensor.element_size()
        if self._folder is None or self._resident + size <= self.limit:
            self._memory[key] = tensor
            self._resident += size
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        # Numbered, since keys hold names that a file system may not take.
        path = self._folder / f"{self._written}.bin"
        self._written += 1
        tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tofile(path)
        self._files[key] = (path, tensor.dtype, tensor.shape)

    def get(self, key: Key, device: torch.device | str = "cpu") -> Tensor:
        """The tensor under `key`, on `device`."""
        if key in self._memory:
            return self._memory[key].to(device)
        path, dtype, shape = self._files[key]
        raw = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
        return raw.view(dtype).view(shape).to(device)

    def __contains__(self, key: Key) -> bool:
        return key in self._memory or key in self._files

    def drop(self, key: Key) -> None:
        """Forgets `key`; nothing happens if it is not there."""
        if (tensor := self._memory.pop(key, None)) is not None:
            self._resident -= tensor.numel() * tensor.element_size()
        if (entry := self._files.pop(key, None)) is not None:
            with contextlib.suppress(OSError):
                entry[0].unlink()

    def clear(self) -> None:
        """Forgets everything and removes the folder."""
        self._memory.clear()
        self._files.clear()
        self._resident = 0
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def return_freed_memory() -> None:
    """Asks glibc to hand memory back to the system once it keeps FREED bytes of it; does nothing on other systems.

    It otherwise keeps the activations and Hessians of a block: 0.4 GB of the peak on a 1.1 B model. A small model takes
    its memory again at once: handing it over costs 1.6 of 46 s of compressing 14 M weights, and page faults follow.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        if (info := getattr(libc, "mallinfo2", None)) is not None:
            info.restype = _Heap
            heap = info()
            # What was handed back stays in the account of what is free, but not in memory.
            if min(heap.fordblks, _resident() - heap.uordblks - heap.hblkhd) <= FREED:
                return
        libc.malloc_trim(0)


def _resident() -> int:
    """Bytes of this process in memory that no file backs."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


class _Heap(ctypes.Structure):
    """What mallinfo2 (glibc 2.33 and newer) answers: bytes in use are `uordblks` and `hblkhd`, free ones `fordblks`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip
