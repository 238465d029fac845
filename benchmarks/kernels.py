"""How near the GPU kernels come to the speed of memory, beside other people's, in one run on one GPU.

1. The floor of a matrix is its bytes (codes, scales, zeros) by the bandwidth that a copy of 1 GiB reaches in this run.
2. Weights are copied until they exceed 240 MB, four times the cache of a large GPU, and a CUDA graph calls the product
   once with each copy: what is measured reads memory and launches as a decoder in a graph does. A figure is the median
   of replays, by the number of copies.
3. `norm and gates` rows are gate and up of a decoder: an RMSNorm before them and SwiGLU behind, in three launches or
   with torch's own kernels around the product. `cache` rows read the packed keys of a layer, `experts` rows multiply
   with those that tokens choose.
4. `mixed` is one matrix of 2-, 3-, 4- and 8-bit rows with about the bytes of 4 bits; its `floor_fraction` beside that
   of 4 bits is what mixing costs.

Peers, where they are installed: torch in bfloat16, bitsandbytes NF4, torchao int4, GemLite, Marlin; groups of 128 (NF4:
64). A peer that fails is a row with `error`. Marlin is taken from gptqmodel, which compiles it with nvcc at first use.

    python benchmarks/kernels.py               writes results/kernels-GPU.json and .svg (Triton compiles on the way)
    python benchmarks/kernels.py --dry-run     small shapes in Triton's interpreter: every path once, nothing timed
"""

import contextlib
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 4096), (128256, 4096))
DRY_SHAPES = ((96, 512), (64, 1024))
BATCHES = (1, 4, 8, 16, 64, 512)
DRY_BATCHES = (1, 9, 40)
MIXED = {2: 0.4, 3: 0.2, 4: 0.1, 8: 0.3}
"""Share of the rows of each number of bits: 4.2 bits a weight."""
GROUP = 128
COLD = 240 << 20
"""Bytes of weights that no cache holds."""
REPLAYS = 20
Product = Callable[[Tensor, int], Tensor]
"""Multiplies activations with one of the copies of a matrix."""


@click.command(context_settings={"show_default": True})
@click.option("--dry-run", is_flag=True, help="Small shapes on the CPU, untimed; writes nothing.")
@click.option("--minutes", default=8.0, help="Begin no new shape after so many minutes.")
@click.option("--out", default=Path(__file__).with_name("results"), type=click.Path(path_type=Path), help="Folder.")
def main(dry_run: bool, minutes: float, out: Path) -> None:
    """Times products with packed matrices on this GPU against the bandwidth of its memory and against peers."""
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported
    elif not torch.cuda.is_available():
        raise click.ClickException("there is no CUDA device: --dry-run goes through every path on a CPU")
    device = "cpu" if dry_run else "cuda"
    bandwidth = None if dry_run else copy_bandwidth()
    if not dry_run and find_spec("gptqmodel"):
        compile_marlin()
    end = time.monotonic() + 60 * minutes
    rows: list[dict[str, Any]] = []
    for n, k in DRY_SHAPES if dry_run else SHAPES:
        if time.monotonic() > end:
            click.echo(f"no time is left for {n}x{k}", err=True)
            continue
        for row in measure(n, k, DRY_BATCHES if dry_run else BATCHES, device, bandwidth):
            rows.append(row)
            click.echo(json.dumps(row))
    lengths = (100,) if dry_run else (2048, 8192)
    for row in chain(caches(lengths, device, bandwidth), chosen_experts(device, bandwidth)):
        rows.append(row)
        click.echo(json.dumps(row))
    if not dry_run:
        from common import save_results
        from plots import draw

        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        extra = {"gpu": name, "copy_bytes_per_second": bandwidth, "cuda": torch.version.cuda}
        save_results(out / f"kernels-{name}.json", rows, **extra)
        draw(out / f"kernels-{name}.json")


def measure(n: int, k: int, batches: tuple[int, ...], device: str, bandwidth: float | None) -> Iterator[dict[str, Any]]:
    """Rows of one shape [n, k]; `bandwidth` in bytes a second, None without timing."""
    candidates: list[tuple[str, int | str, Callable[[], tuple[Product, int, int]]]] = [
        *(("circuitpress", bits, lambda bits=bits: ours(n, k, {bits: 1.0}, device)) for bits in (2, 3, 4, 8)),
        ("circuitpress", "mixed", lambda: ours(n, k, MIXED, device)),
        ("circuitpress, norm and gates fused", 4, lambda: gated(n, k, device, fused=True)),
        ("circuitpress, norm and gates in torch", 4, lambda: gated(n, k, device, fused=False)),
        ("torch bfloat16", 16, lambda: dense(n, k, device)),
    ]
    if device == "cuda":
        candidates += [
            (name, 4, lambda build=build: build(n, k))
            for name, module, build in (
                ("bitsandbytes nf4", "bitsandbytes", nf4),
                ("torchao int4", "torchao", torchao_int4),
                ("gemlite int4", "gemlite", gemlite_int4),
                ("marlin int4", "gptqmodel", marlin_int4),
            )
            if find_spec(module)
        ]
    for method, bits, build in candidates:
        row = {"n": n, "k": k, "bits": bits, "method": method}
        try:
            product, copies, size = build()
            for batch in batches:
                x = torch.randn(batch, k, device=device).to(torch.bfloat16 if device == "cuda" else torch.float16)
                seconds = graph_seconds(product, x, copies) if bandwidth else once(product, x)
                floor = size / bandwidth if bandwidth else None
                yield row | {
                    "batch": batch, "bytes": size,
                    "microseconds": None if seconds is None else 1e6 * seconds,
                    "floor_fraction": None if seconds is None or floor is None else floor / seconds,
                }  # fmt: skip
        except Exception as error:  # a peer's failure must not end an unattended run; ours is tested elsewhere
            if device == "cpu":
                raise
            yield row | {"error": f"{type(error).__name__}: {str(error)[:200]}"}


def caches(lengths: tuple[int, ...], device: str, bandwidth: float | None) -> Iterator[dict[str, Any]]:
    """Reading packed keys of one layer, 8 KV heads of 128: n tokens of k numbers; the floor counts what is written."""
    from circuitpress_kernels.kv import CacheForm, CacheRows, head_table, pack_cache
    from circuitpress_kernels.kv_triton import read_rows

    heads, dim, group = (2, 32, 4) if device == "cpu" else (8, 128, 64)
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    for tokens in lengths:
        for name, bits in ((4, (4,)), (8, (8,)), ("mixed", (4, 8))):
            form = CacheForm(bits * (heads // len(bits)), dim, group)
            table = head_table(form).to(device)
            for batch in (1, 8):
                first = pack_cache(torch.randn(batch, heads, tokens, dim, device=device).to(dtype), form)
                size = sum(tensor.nbytes for tensor in first) + 2 * batch * heads * tokens * dim
                copies = copies_of(size, device)
                rows = [first, *(CacheRows(*(tensor.clone() for tensor in first)) for _ in range(copies - 1))]
                x = torch.zeros(1, device=device)

                def read(_: Tensor, number: int, rows: Any = rows, form: Any = form, table: Tensor = table) -> Tensor:
                    return read_rows(rows[number], form, table, dtype)

                seconds = graph_seconds(read, x, copies) if bandwidth else once(read, x)
                yield {
                    "n": tokens, "k": heads * dim, "bits": name, "method": "circuitpress cache", "batch": batch,
                    "bytes": size, "microseconds": None if seconds is None else 1e6 * seconds,
                    "floor_fraction": None if seconds is None or bandwidth is None else size / bandwidth / seconds,
                }  # fmt: skip


def chosen_experts(device: str, bandwidth: float | None) -> Iterator[dict[str, Any]]:
    """Gate and up of a layer of 64 experts in 4 bits, of which every token takes 6: the floor counts those chosen."""
    from circuitpress_kernels.experts import Experts, stack_experts
    from circuitpress_kernels.experts_triton import expert_product

    count, n, k, each = (4, 64, 96, 2) if device == "cpu" else (64, 2816, 2048, 6)
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    parts = [random_parts(n, k, {4: 1.0}, device) for _ in range(count)]
    first = stack_experts(parts, rows=n, cols=k, dtype=dtype, programs=4 if device == "cpu" else 64)
    size = sum(tensor.nbytes for tensor in first[:3])
    copies = copies_of(size, device)
    layers = [first, *(Experts(*(t.clone() for t in first[:-1]), form=first.form) for _ in range(copies - 1))]
    for batch in (1, 4) if device == "cpu" else (1, 4, 8, 32):
        choice = torch.stack([torch.randperm(count, device=device)[:each] for _ in range(batch)])
        x = torch.randn(batch, k, device=device).to(dtype)

        def product(x: Tensor, number: int, choice: Tensor = choice) -> Tensor:
            return expert_product(x, layers[number], choice, gated=True)

        seconds = graph_seconds(product, x, copies) if bandwidth else once(product, x)
        read = size * len(choice.unique()) // count
        yield {
            "n": n, "k": k, "bits": 4, "method": "circuitpress experts", "batch": batch, "bytes": read,
            "microseconds": None if seconds is None else 1e6 * seconds,
            "floor_fraction": None if seconds is None or bandwidth is None else read / bandwidth / seconds,
        }  # fmt: skip


def ours(n: int, k: int, shares: dict[int, float], device: str) -> tuple[Product, int, int]:
    """(product, copies, bytes) of a random matrix with rows of the given bits."""
    from circuitpress_kernels.launch_triton import slice_product

    matrices, size = laid_out(n, k, shares, device)
    return lambda x, number: slice_product(x, matrices[number], None), len(matrices), size


def gated(n: int, k: int, device: str, *, fused: bool) -> tuple[Product, int, int]:
    """Gates and up of n / 2 neurons each behind an RMSNorm, in 4 bits: fused, or with torch around the product."""
    from circuitpress_kernels.fused import Around, finish_twin, places_of, prepare_twin
    from circuitpress_kernels.fused_launch_triton import fused_product
    from circuitpress_kernels.launch_triton import slice_product

    matrices, size = laid_out(n, k, {4: 1.0}, device)
    places = [places_of(matrix) for matrix in matrices]
    gain = torch.ones(k, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float16)
    around = Around(gain, 1e-6, gated=True)
    if fused:
        return lambda x, number: fused_product(x, matrices[number], places[number], around), len(matrices), size
    plain = Around(gated=True)

    def product(x: Tensor, number: int) -> Tensor:
        return finish_twin(slice_product(prepare_twin(x, around), matrices[number], None), plain)

    return product, len(matrices), size


def laid_out(n: int, k: int, shares: dict[int, float], device: str) -> tuple[list[Any], int]:
    """Copies of a random matrix in slices with rows of the given bits; the bytes of one."""
    from circuitpress_kernels import SliceMatrix, lay_out

    parts = random_parts(n, k, shares, device)
    programs = 6 * torch.cuda.get_device_properties(0).multi_processor_count if device == "cuda" else 12
    first = lay_out(parts, axis="rows", rows=n, cols=k, dtype=torch.bfloat16, programs=programs)
    size = sum(tensor.nbytes for tensor in first[:3])
    copies = copies_of(size, device)
    return [first, *(SliceMatrix(*(t.clone() for t in first[:-1]), form=first.form) for _ in range(copies - 1))], size


def random_parts(n: int, k: int, shares: dict[int, float], device: str) -> list[Any]:
    """Rows of the given bits, in groups of 128."""
    from circuitpress_kernels import Part

    parts, start = [], 0
    for number, (bits, share) in enumerate(shares.items()):
        stop = n if number == len(shares) - 1 else start + round(share * n)
        groups = (stop - start, -(-k // GROUP))
        codes = torch.randint(0, 2**bits, (stop - start, k), dtype=torch.uint8, device=device)
        scales = (0.01 + 0.01 * torch.rand(groups, device=device)).half()
        zeros = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.uint8)
        parts.append(Part(start, bits, codes, GROUP, scales, zeros))
        start = stop
    return parts


def dense(n: int, k: int, device: str) -> tuple[Product, int, int]:
    """torch's own product in 16 bits."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    copies = copies_of(2 * n * k, device)
    weights = [torch.randn(n, k, device=device, dtype=dtype) for _ in range(copies)]
    return lambda x, number: torch.nn.functional.linear(x, weights[number]), copies, 2 * n * k


def nf4(n: int, k: int) -> tuple[Product, int, int]:
    """bitsandbytes: a fixed table of 16 values, one maximum for every 64 weights."""
    from bitsandbytes import matmul_4bit  # pyright: ignore[reportPrivateImportUsage]
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    size = packed.nbytes + state.absmax.nbytes
    stored = [packed, *(packed.clone() for _ in range(copies_of(size, "cuda") - 1))]
    return lambda x, number: matmul_4bit(x, stored[number].t(), quant_state=state), len(stored), size


def torchao_int4(n: int, k: int) -> tuple[Product, int, int]:
    """torchao: weight-only int4 in groups of 128."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_  # pyright: ignore[reportMissingImports]

    size = n * k // 2 + 4 * n * k // GROUP
    layers = []
    for _ in range(copies_of(size, "cuda")):
        layer = torch.nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16)
        quantize_(layer, Int4WeightOnlyConfig(group_size=GROUP))
        layers.append(layer)
    return lambda x, number: layers[number](x), len(layers), size


def gemlite_int4(n: int, k: int) -> tuple[Product, int, int]:
    """GemLite: int4 in groups of 128 with scales and zeros."""
    from gemlite.core import DType, GemLiteLinear  # pyright: ignore[reportMissingImports]

    size = n * k // 2 + 4 * n * k // GROUP
    layers = []
    for _ in range(copies_of(size, "cuda")):
        layer = GemLiteLinear(
            4, group_size=GROUP, in_features=k, out_features=n, input_dtype=DType.BF16, output_dtype=DType.BF16
        )
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
        scales = torch.full((n * k // GROUP, 1), 0.01, dtype=torch.bfloat16, device="cuda")
        layer.pack(codes, scales, torch.full_like(scales, 8), bias=None)
        layers.append(layer)
    return lambda x, number: layers[number](x), len(layers), size


def marlin_int4(n: int, k: int) -> tuple[Product, int, int]:
    """Marlin as gptqmodel 7 has it: symmetric int4 in groups of 128; `post_init` packs GPTQ's layout into Marlin's."""
    from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear  # pyright: ignore[reportMissingImports]

    size = n * k // 2 + 2 * n * k // GROUP
    layers = []
    for _ in range(copies_of(size, "cuda")):
        with torch.device("cuda"):
            layer = MarlinLinear(
                bits=4, group_size=GROUP, desc_act=False, sym=True, in_features=k, out_features=n, dtype=torch.bfloat16
            )
        layer.qweight.data.random_(-(2**31), 2**31 - 1)  # eight codes a word, and every word is one
        layer.scales.data.fill_(0.01)
        layer.post_init()
        layers.append(layer)
    return lambda x, number: layers[number](x), len(layers), size


def compile_marlin() -> None:
    """Lets gptqmodel compile Marlin before the clock runs: minutes of nvcc, once on a machine."""
    with contextlib.suppress(Exception):  # the rows of this peer say what is missing
        from gptqmodel import extension  # pyright: ignore[reportMissingImports]

        extension.load("marlin_bf16")


def copies_of(size: int, device: str) -> int:
    """Copies of a matrix of so many bytes that no cache holds."""
    return 1 if device == "cpu" else max(2, -(-COLD // size))


def once(product: Product, x: Tensor) -> None:
    """Calls a product and looks at what it returns; times nothing."""
    if not product(x, 0).isfinite().all():
        raise ValueError("a product is not finite")


def graph_seconds(product: Product, x: Tensor, copies: int) -> float:
    """Seconds of one product: the median of replays of a graph that goes through all copies."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for number in range(copies):  # compiles, and lets libraries allocate
            product(x, number)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(copies):
            product(x, number)
    return statistics.median([seconds(graph.replay) for _ in range(REPLAYS + 3)][3:]) / copies


def seconds(run: Callable[[], Any]) -> float:
    """Seconds on the device between two events around a call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of copying 1 GiB: the median of 20 copies after 3."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source)) for _ in range(REPLAYS + 3)][3:]
    return 2 * source.nbytes / statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
