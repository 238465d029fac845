"""`bench kernels --tune`: times launches of the GPU kernels and keeps the best for this machine.

1. For each format and shape of a model, and for few and for many rows of activations, every candidate multiplies with
   copies of a matrix that no cache holds, in a CUDA graph. Candidates that the GPU refuses are left out.
2. Shapes that share a situation (circuitpress_kernels/launches.py) vote: what counts is the mean of their times, each
   relative to that of the default launch. A candidate must gain 2 %, about what measuring again changes.
3. Programs are fixed when a matrix is laid out: they are chosen at few rows, and candidates for many rows keep them.
"""

import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from circuitpress_kernels.launches import (
    REGIMES,
    Launch,
    Situation,
    default,
    forced,
    read,
    rows_of,
    situation,
    tables,
    user_file,
)

from ..console import Advance, ignore
from ..errors import CircuitpressError
from ..files import write_bytes_atomic
from ..runtime.linear import PackedLinear
from .latency import copies, random_module

CANDIDATES = tuple(Launch(*each) for each in itertools.product((3, 6, 12), (1, 2, 4), (2, 3, 4)))
LEAST_GAIN = 0.02
REPLAYS = 15
Timer = Callable[[str, tuple[int, int], int, Launch], float | None]
"""Seconds of a product in (format, shape, rows of activations, launch); None if the device refuses the launch."""
KindsOf = Callable[[str, tuple[int, int]], int | None]
"""The kinds of a format's pieces at a shape, None if no kernel runs it."""


def tune(
    shapes: Sequence[tuple[int, int]], formats: Sequence[str], *, device: str, timer: Timer, kinds_of: KindsOf,
    advance: Advance = ignore,
) -> dict[Situation, Launch]:  # fmt: skip
    """The best launch of every situation of these shapes on the GPU of the name `device`."""
    cases: dict[tuple[int, int], list[tuple[str, tuple[int, int]]]] = {}
    for name, shape in itertools.product(formats, shapes):
        kinds = kinds_of(name, shape)
        if kinds is not None:
            cases.setdefault((kinds, shape[0] * shape[1]), []).append((name, shape))
    found: dict[Situation, Launch] = {}
    groups: dict[Situation, list[tuple[str, tuple[int, int]]]] = {}
    for (kinds, weights), members in cases.items():
        groups.setdefault(situation(device, kinds, rows=REGIMES[0], weights=weights), []).extend(members)
    for few, members in groups.items():
        usual, fixed = default(few.kinds), False
        for rows in REGIMES:
            others = [launch for launch in CANDIDATES if not fixed or launch.programs == usual.programs]
            tried = list(dict.fromkeys((usual, *others)))
            by_member = [[timer(name, shape, rows, launch) for launch in tried] for name, shape in members]
            times = dict(zip(tried, zip(*by_member, strict=True), strict=True))
            found[few._replace(rows=rows)] = best(times, usual)
            usual, fixed = usual._replace(programs=found[few].programs), True
        advance(len(members), ", ".join(sorted({name for name, _ in members})))
    return found


def best(times: Mapping[Launch, Sequence[float | None]], usual: Launch) -> Launch:
    """The launch with the least mean of times relative to `usual`, or `usual` if none gains LEAST_GAIN."""
    base = times[usual]
    means = {}
    for launch, own in times.items():
        ratios = [t / b for t, b in zip(own, base, strict=True) if t is not None and b is not None]
        if len(ratios) == len(base):
            means[launch] = statistics.fmean(ratios)
    least = min(means, key=lambda launch: means[launch], default=usual)
    return least if means.get(least, 1.0) <= 1 - LEAST_GAIN else usual


def on_gpu(device: str, *, dtype: torch.dtype = torch.bfloat16) -> tuple[Timer, KindsOf]:
    """A timer and kinds on a GPU; CircuitpressError without one."""
    if not device.startswith("cuda"):
        message = f"--tune times launches of kernels on a GPU, and this is {device!r}: there is none to time"
        hint = "circuitpress bench kernels MODEL --save times.json   (times what a CPU runs; it has no launches)"
        raise CircuitpressError(message, hint=hint)

    @lru_cache(maxsize=1)
    def modules(name: str, shape: tuple[int, int], programs: int) -> Sequence[nn.Module]:
        with forced(Launch(programs, 2, 2)):
            module = random_module(name, *shape, device=device, dtype=dtype)
        assert module is not None
        return copies(module)

    def timer(name: str, shape: tuple[int, int], rows: int, launch: Launch) -> float | None:
        from triton.errors import TritonError

        with forced(launch), torch.no_grad():
            try:
                x = torch.randn(rows, shape[1], dtype=dtype, device=device)
                return graph_seconds(modules(name, shape, launch.programs), x)
            except TritonError:  # more shared memory or registers than there are
                return None

    def kinds_of(name: str, shape: tuple[int, int]) -> int | None:
        module = random_module(name, *shape, device=device, dtype=dtype)
        return module.slices.kinds if isinstance(module, PackedLinear) and module.slices is not None else None

    return timer, kinds_of


def graph_seconds(modules: Sequence[nn.Module], x: Tensor) -> float:
    """Seconds of one product: the median of replays of a CUDA graph that goes through all modules."""
    stream = torch.cuda.Stream(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        for module in modules:  # compiles, and lets libraries allocate
            module(x)
    torch.cuda.current_stream(x.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for module in modules:
            module(x)
    found = []
    for _ in range(REPLAYS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(found[2:]) / len(modules)


def save(found: Mapping[Situation, Launch], path: Path | None = None) -> Path:
    """Writes launches to the user's file, where situations that were not measured now are kept; from now on they count.

    Returns the file.
    """
    path = path or user_file()
    document = {"launches": rows_of(read(path) | dict(found))}
    write_bytes_atomic(path, (json.dumps(document, indent=1) + "\n").encode())
    tables.cache_clear()
    return path
