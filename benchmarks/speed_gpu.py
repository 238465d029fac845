"""How fast a packed Llama-3-8B decodes and reads prompts on this GPU: eager, compiled, and in a CUDA graph.

1. The model is the shape of Llama-3-8B with random weights. One layer is packed and fused as a loaded model's is; the
   others are copies with random words: in the kernels' layout every word is a code, so 8 billion weights take seconds.
2. A step is one token for each sequence behind a static cache of transformers: mask, all layers, head, argmax. The
   token, its position and the cache stay on the GPU, so that a CUDA graph holds a step and replays decode a text.
3. `compiled` is torch.compile of the model's forward with `reduce-overhead` and no graph breaks; it takes a minute or
   two, so that one number of bits is compiled unless told otherwise. What fails is a row with `error`.
4. `floor_fraction` is the time that a copy takes to read the weights of a step (all but the embedding), by the time of
   a step. The head is packed as the layers are, in 4 bits at least.

    python benchmarks/speed_gpu.py               writes results/speed-GPU.json and .svg
    python benchmarks/speed_gpu.py --dry-run     a tiny model in Triton's interpreter: every path once, nothing timed
"""

import copy
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from circuitpress.runtime.linear import PackedLinear

MIXED = {2: 0.4, 3: 0.2, 4: 0.1, 8: 0.3}
"""Share of the rows of each number of bits in every matrix: 4.2 bits a weight."""
VARIANTS: dict[str, Mapping[int, float]] = {"4": {4: 1.0}, "mixed": MIXED, "2": {2: 1.0}, "3": {3: 1.0}, "16": {}}
GROUP = 128
ROUNDS = 3
LLAMA_3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64,
}  # fmt: skip


@click.command(context_settings={"show_default": True})
@click.option("--dry-run", is_flag=True, help="A tiny model on the CPU, untimed; writes nothing.")
@click.option("--bits", "names", multiple=True, default=tuple(VARIANTS), type=click.Choice(tuple(VARIANTS)))
@click.option("--compiled", multiple=True, default=("4",), type=click.Choice(tuple(VARIANTS)), help="Which to compile.")
@click.option("--batch", "batches", multiple=True, default=(1, 8), help="Sequences decoded at once; repeatable.")
@click.option("--context", default=128, help="Tokens before the first that is decoded.")
@click.option("--steps", default=64, help="Tokens decoded in one measurement.")
@click.option("--prompt", default=2048, help="Tokens of a prompt.")
@click.option("--minutes", default=8.0, help="Begin nothing after so many minutes.")
@click.option("--out", default=Path(__file__).with_name("results"), type=click.Path(path_type=Path), help="Folder.")
def main(
    dry_run: bool, names: tuple[str, ...], compiled: tuple[str, ...], batches: tuple[int, ...], context: int,
    steps: int, prompt: int, minutes: float, out: Path,
) -> None:  # fmt: skip
    """Times random Llama-3-8Bs of several widths on this GPU."""
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported
        interpret()
        context, steps, prompt, batches = 5, 2, 33, batches[:1]
    elif not torch.cuda.is_available():
        raise click.ClickException("there is no CUDA device: --dry-run goes through every path on a CPU")
    from kernels import copy_bandwidth  # pyright: ignore[reportAttributeAccessIssue] (benchmarks/kernels.py)

    device = "cpu" if dry_run else "cuda"
    bandwidth = None if dry_run else copy_bandwidth()
    end = time.monotonic() + 60 * minutes
    rows: list[dict[str, Any]] = []
    for name in names:
        if time.monotonic() > end:
            click.echo(f"no time is left for {name} bits", err=True)
            continue
        modes = ("eager", "graph", *(("compiled",) if name in compiled else ()))
        started = time.monotonic()
        model = build(TINY if dry_run else LLAMA_3_8B, VARIANTS[name], device)
        built = time.monotonic() - started
        for row in measure(model, modes, batches, context, steps, prompt, bandwidth, end):
            rows.append({"model": "llama-3-8b", "bits": name, "build_seconds": round(built, 1)} | row)
            click.echo(json.dumps(rows[-1]))
        del model
        if not dry_run:
            torch.compiler.reset()
            torch.cuda.empty_cache()
    if not dry_run:
        from common import save_results
        from plots import draw

        gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        extra = {"gpu": gpu, "copy_bytes_per_second": bandwidth, "cuda": torch.version.cuda}
        save_results(out / f"speed-{gpu}.json", rows, **extra)
        draw(out / f"speed-{gpu}.json")


def interpret() -> None:
    """Lets the product of a fused layer run in Triton's interpreter on a CPU, where its specification would run."""
    from circuitpress_kernels.fused import Around, Turn, fused_linear_op
    from circuitpress_kernels.fused_launch_triton import fused_product
    from circuitpress_kernels.slices import SliceForm, SliceMatrix

    def product(x: Tensor, tensors: list[Tensor], *rest: Any) -> Tensor:
        gain, sources, factors, bias, residual, eps, block, gated, form = rest
        matrix = SliceMatrix(*tensors[:-1], form=SliceForm(*form[:-1], bfloat=bool(form[-1])))
        turn = None if sources is None else Turn(sources, factors, block)
        return fused_product(x, matrix, tensors[-1], Around(gain, eps, turn, bias, residual, gated))

    fused_linear_op.register_kernel("cpu")(product)


def build(shape: Mapping[str, Any], shares: Mapping[int, float], device: str) -> Any:
    """A Llama of random weights whose matrices have rows of the given bits in bfloat16; dense without any."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from circuitpress.runtime.fusion import fuse_layers

    config = LlamaConfig(**{**shape, "num_hidden_layers": 1}, tie_word_embeddings=False)
    with torch.device(device):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    first = model.model.layers[0]
    if shares:
        for owner in (first.self_attn, first.mlp):
            for name, linear in list(owner.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(owner, name, packed(linear, shares, device))
        assert fuse_layers(model, torch.bfloat16) == 1
        head = packed(model.lm_head, {max(4, *shares) if len(shares) == 1 else 4: 1.0}, device)
        head.repack(torch.bfloat16, slices=True)
        model.lm_head = head
    for index in range(1, shape["num_hidden_layers"]):
        layer = copy.deepcopy(first)
        layer.self_attn.layer_idx = index
        for name, buffer in layer.named_buffers():
            if name.endswith("words"):
                buffer.random_(-32768, 32767)
        model.model.layers.append(layer)
    config.num_hidden_layers = shape["num_hidden_layers"]
    model.config.num_hidden_layers = shape["num_hidden_layers"]
    return model


def packed(linear: nn.Linear, shares: Mapping[int, float], device: str) -> PackedLinear:
    """A module of the shape of `linear` with rows of the given bits, in groups of GROUP."""
    from circuitpress.bench.latency import random_packed
    from circuitpress.formats import parse
    from circuitpress.runtime.descriptor import Descriptor, Part

    rows, cols = linear.weight.shape
    parts, start = [], 0
    for number, (bits, share) in enumerate(shares.items()):
        stop = rows if number == len(shares) - 1 else start + round(share * rows / 32) * 32
        if stop > start:
            parts.append(Part(parse(f"int{bits}g{GROUP}"), start, stop, stop - start, cols))
        start = stop
    return random_packed(Descriptor(rows, cols, "rows", tuple(parts)), device=device, dtype=torch.bfloat16)


@torch.no_grad()
def measure(
    model: Any, modes: tuple[str, ...], batches: tuple[int, ...], context: int, steps: int, prompt: int,
    bandwidth: float | None, end: float,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Rows of one model: decoding in each mode, and a prompt; `bandwidth` in bytes a second, None without timing."""
    timed = bandwidth is not None
    embedding = model.model.embed_tokens.weight.nbytes
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) - embedding
    for mode in modes:
        for batch in batches if mode == "graph" else batches[:1]:
            if time.monotonic() > end:
                continue
            if timed:
                torch.cuda.reset_peak_memory_stats()
            row = {"phase": "decode", "mode": mode, "batch": batch, "context": context, "weight_bytes": size}
            try:
                seconds = Decoder(model, batch, context, steps, compiled=mode == "compiled", timed=timed).seconds(
                    steps, graph=mode == "graph"
                )
            except Exception as error:  # noqa: BLE001 (the other rows are still worth having)
                yield row | {"error": f"{type(error).__name__}: {error}"[:300]}
                if not timed:
                    raise
                continue
            yield row | {
                "milliseconds": None if seconds is None else 1e3 * seconds,
                "tokens_per_second": None if seconds is None else batch / seconds,
                "floor_fraction": None if seconds is None or bandwidth is None else size / bandwidth / seconds,
                "peak_bytes": torch.cuda.max_memory_allocated() if timed else None,
            }
    ids = torch.arange(prompt, device=model.device)[None] % model.config.vocab_size

    def read() -> None:
        model(ids, use_cache=False, logits_to_keep=1)

    if timed:
        torch.cuda.reset_peak_memory_stats()
    read()
    seconds = statistics.median(elapsed(read) for _ in range(ROUNDS)) if timed else None
    yield {
        "phase": "prefill", "mode": "eager", "batch": 1, "context": prompt, "weight_bytes": size,
        "milliseconds": None if seconds is None else 1e3 * seconds,
        "tokens_per_second": None if seconds is None else prompt / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if timed else None,
    }  # fmt: skip


class Decoder:
    """`batch` sequences behind a prompt of `context` tokens, with room for `steps` more."""

    def __init__(self, model: Any, batch: int, context: int, steps: int, *, compiled: bool, timed: bool) -> None:
        from transformers import StaticCache

        self.context, self.timed = context, timed
        self.forward = model.forward
        if compiled:
            how: dict[str, Any] = {"mode": "reduce-overhead"} if timed else {"backend": "aot_eager"}
            self.forward = torch.compile(model.forward, fullgraph=True, dynamic=False, **how)
        self.cache = StaticCache(config=model.config, max_cache_len=context + steps)
        ids = torch.arange(batch * context, device=model.device).view(batch, -1) % model.config.vocab_size
        model(ids, past_key_values=self.cache, logits_to_keep=1)
        self.token = torch.ones(batch, 1, dtype=torch.long, device=model.device)
        self.position = torch.full((1, 1), context, device=model.device)
        self.columns = torch.arange(context + steps, device=model.device)

    def step(self) -> None:
        """Decodes a token for each sequence; nothing leaves the device."""
        mask = (self.columns <= self.position)[None, None]
        logits = self.forward(
            self.token, attention_mask=mask, position_ids=self.position, past_key_values=self.cache, logits_to_keep=1
        ).logits
        self.token.copy_(logits.argmax(-1))
        self.position.add_(1)

    def rewind(self) -> None:
        """Goes back to the end of the prompt."""
        self.position.fill_(self.context)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)  # pyright: ignore[reportAttributeAccessIssue]

    def seconds(self, steps: int, *, graph: bool) -> float | None:
        """Seconds of a step: the median of rounds of `steps`; None if not timed, where logits are looked at instead."""
        if not self.timed:
            for _ in range(steps):
                self.step()
            if int(self.position) != self.context + steps or not self.token.ge(0).all():
                raise ValueError("a step was lost")
            self.rewind()
            return None
        run = self.captured() if graph else self.step
        for _ in range(min(steps, 4)):
            run()
        times = []
        for _ in range(ROUNDS):
            self.rewind()
            times.append(elapsed(lambda: [run() for _ in range(steps)]) / steps)
        return statistics.median(times)

    def captured(self) -> Callable[[], None]:
        """The step as a CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and lets libraries allocate
            for _ in range(2):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.rewind()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        self.rewind()
        return graph.replay


def elapsed(run: Callable[[], Any]) -> float:
    """Seconds from a quiet device to a quiet device: for eager steps what the CPU takes to launch counts as well."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
