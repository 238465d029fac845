"""How long a linear map takes in every format on this machine: the table that budgets in time are spent by.

For each shape of the model, each format and each batch: the packed module as a loaded model would run it, on weights
that were not used just before. As many copies take turns as exceed the caches (`ROTATED`), since a step of decoding
touches each matrix once. Codes are random: decoding and multiplying take as long for any of them.
"""

import copy
import json
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..console import Advance, ignore
from ..files import write_bytes_atomic
from ..formats import CastFormat, parse
from ..runtime.descriptor import Descriptor, Part
from ..runtime.linear import PackedLinear

ROTATED = 1 << 27
"""Bytes of weights that take turns: four times the largest last-level cache of a desktop, twice an H100's."""
MOST_COPIES = 256
ROUNDS = 7
"""Turns through all copies; the median counts."""


def shapes_of(anatomy: Anatomy) -> list[tuple[int, int]]:
    """The (rows, cols) of all matrices in decoder blocks, largest first."""
    found = {(matrix.rows, matrix.cols) for block in anatomy.blocks for matrix in block.matrices}
    return sorted(found, key=lambda shape: -shape[0] * shape[1])


@torch.no_grad()
def measure(
    shapes: Sequence[tuple[int, int]], formats: Sequence[str], batches: Sequence[int], *, device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16, rotated: int = ROTATED, advance: Advance = ignore,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of format, rows, cols, batch and microseconds; formats that a shape cannot take are left out."""
    rows = []
    for height, width in shapes:
        for name in formats:
            module = random_module(name, height, width, device=device, dtype=dtype)
            if module is not None:
                modules = copies(module, rotated)
                rows += [
                    {
                        "format": name,
                        "rows": height,
                        "cols": width,
                        "batch": batch,
                        "microseconds": 1e6 * _seconds(modules, torch.randn(batch, width, dtype=dtype, device=device)),
                    }
                    for batch in batches
                ]
            advance(1, f"{name}, {height} x {width}")
    return rows


def random_module(name: str, rows: int, cols: int, *, device: str, dtype: torch.dtype) -> nn.Module | None:
    """A module [rows, cols] in the format `name` with random weights, as it runs on `device`; None if it cannot be."""
    form = parse(name)
    if isinstance(form, CastFormat):
        return nn.Linear(cols, rows, bias=False, device=device, dtype=dtype)
    descriptor = Descriptor(rows, cols, "rows", (Part(form, 0, rows, rows, cols),))
    try:
        descriptor.layout()
    except ValueError:
        return None
    module = random_packed(descriptor, device=device, dtype=dtype)
    module.repack(dtype)
    return module


def random_packed(descriptor: Descriptor, *, device: str, dtype: torch.dtype) -> PackedLinear:
    """A module of random weights, as stored."""
    module = PackedLinear(descriptor, bias=False, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(0)
    for key, (kind, count) in descriptor.layout().items():
        module.register_buffer(key, _random(kind, count, generator))
    return module


def save_table(rows: Sequence[dict[str, Any]], path: Path, *, device: str, dtype: torch.dtype) -> str:
    """Writes the table for `plan.latencies`; rows of other cases in the file are kept. Returns the machine's name."""
    machine = describe(device)
    known = json.loads(path.read_text()) if path.exists() else {"machine": machine, "rows": []}
    if known.get("machine") != machine:
        known = {"machine": machine, "rows": []}
    mine = {_case(row) for row in rows}
    kept = [row for row in known["rows"] if _case(row) not in mine]
    document = {"machine": machine, "dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__}
    write_bytes_atomic(path, (json.dumps(document | {"rows": [*kept, *rows]}, indent=1) + "\n").encode())
    return machine


def describe(device: str) -> str:
    """The device by name, and a CPU's threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["format"], row["rows"], row["cols"], row["batch"]


def _random(kind: torch.dtype, count: int, generator: torch.Generator) -> Tensor:
    if kind.is_floating_point:
        return (torch.rand(count, generator=generator, device=generator.device) * 0.01 + 0.001).to(kind)
    if kind == torch.uint8:  # codes, zeros and small scales: every byte stands for something
        return torch.randint(0, 256, (count,), generator=generator, device=generator.device, dtype=kind)
    if kind == torch.int8:  # exponents of scales
        return torch.randint(-8, -3, (count,), generator=generator, device=generator.device, dtype=kind)
    # Outliers, one after the other (formats/outliers.py).
    return torch.full((count,), -32767, dtype=kind, device=generator.device)


def copies(module: nn.Module, rotated: int = ROTATED) -> list[nn.Module]:
    """As many copies of a module as take `rotated` bytes together, two at least."""
    nbytes = sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])
    count = min(MOST_COPIES, max(2, -(-rotated // max(nbytes, 1))))
    return [module, *(copy.deepcopy(module) for _ in range(count - 1))]


def _seconds(modules: Sequence[nn.Module], x: Tensor) -> float:
    """Median time of one call over rounds through all modules."""
    cuda = x.device.type == "cuda"
    for module in modules[:2]:
        module(x)
    found = []
    for _ in range(ROUNDS):
        if cuda:
            torch.cuda.synchronize(x.device)
        start = time.perf_counter()
        for module in modules:
            module(x)
        if cuda:
            torch.cuda.synchronize(x.device)
        found.append((time.perf_counter() - start) / len(modules))
    return statistics.median(found)
