"""What an adapter is given and what it hands back; runs in the peer's own environment, without circuitpress.

A job is one json file. Its fields are those of `Job`; the calibration tokens are the tensor `ids` of a safetensors
file. An adapter is a module with one function

    def quantize(job: Job) -> Mapping[str, Kept]

which calls the peer's public interface on the checkpoint, wraps the peer's own work in `job.timed()` (imports, loading
and decoding stay outside), and returns for every matrix the weights that the peer's model computes with and the bytes
that it keeps for them. A matrix that is left out stays as it is and counts 16 bits a weight.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class Kept(NamedTuple):
    """One matrix as the peer keeps it: decoded weights float32 [rows, cols], and its bytes, all side data included."""

    weight: Tensor
    nbytes: int


@dataclass
class Job:
    """One quantization of one checkpoint by one peer.

    `matrices` maps the module name of every linear matrix to its (rows, cols); `options` are the peer's own. The clocks
    and `notes` are filled while the adapter works.
    """

    checkpoint: str
    ids: str
    bits: int
    group_size: int
    options: dict[str, Any]
    matrices: dict[str, tuple[int, int]]
    scratch: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Adds what happens inside to the job's clocks."""
        wall, cpu = time.monotonic(), time.process_time()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - wall
            self.cpu_seconds += time.process_time() - cpu

    def tokens(self) -> Tensor:
        """The calibration tokens, int64 [windows, length]."""
        return load_file(self.ids)["ids"]

    def load(self, dtype: torch.dtype = torch.float32) -> Any:
        """The checkpoint through transformers, on the CPU."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=dtype).eval()

    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.checkpoint)

    def linears(self, model: nn.Module) -> dict[str, Any]:
        """The modules of `matrices`."""
        return {name: model.get_submodule(name) for name in self.matrices}

    def group(self, cols: int) -> int:
        """`group_size`, or the largest of 64, 32, 16 below it that divides `cols`; 0 if none does."""
        sizes = (self.group_size, *(size for size in (64, 32, 16) if size < self.group_size))
        return next((size for size in sizes if cols % size == 0), 0)


def affine_bytes(rows: int, cols: int, bits: int, group: int, *, zero_bits: float, scale_bits: int = 16) -> int:
    """Bytes of tightly packed codes with a scale and a zero point for every `group` columns of a row."""
    groups = rows * -(-cols // group)
    return -(-int(rows * cols * bits + groups * (scale_bits + zero_bits)) // 8)


def affine(codes: Tensor, scale: Tensor, zero: Tensor | float, group: int) -> Tensor:
    """(codes - zero) x scale in float32: codes [rows, cols], scale and zero [rows, groups]."""
    rows, cols = codes.shape
    spread = scale.float().repeat_interleave(group, 1)[:, :cols]
    offset = zero.float().repeat_interleave(group, 1)[:, :cols] if isinstance(zero, Tensor) else zero
    return (codes.float() - offset) * spread


def versions(names: list[str]) -> dict[str, str]:
    """The installed versions of the distributions `names` that there are."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def kept_as_json(kept: Mapping[str, Kept], job: Job) -> dict[str, int]:
    """Bytes by matrix; 16 bits a weight for the ones that the peer left alone."""
    sizes = {name: rows * cols * 2 for name, (rows, cols) in job.matrices.items()}
    return sizes | {name: entry.nbytes for name, entry in kept.items()}


def scratch(job: Job, name: str) -> Path:
    """A folder of the job for the peer's own files."""
    path = Path(job.scratch) / name
    path.mkdir(parents=True, exist_ok=True)
    return path
