"""How fast a packed model decodes on this CPU, and how much memory it takes, against the same model in bfloat16.

1. A Llama of random weights is written to a temporary folder twice: dense, and packed by plain min-max rounding (speed
   does not depend on the values). Its blocks have the shape of TinyLlama-1.1B unless told otherwise.
2. Both are loaded into one process and timed in turn, step by step, so that what else the machine does falls on both
   alike; a figure is the median over the steps, a ratio the median of the ratios of neighbours.
3. Memory is measured in a process of its own for each: the most resident memory during load and decoding, less what the
   libraries took before.

Rows: phase `decode` is one token for each of `batch` sequences behind a cache of 128 tokens; `prefill` is a prompt of
`batch` tokens. `ratio_to_dense` divides times, `memory_ratio_to_dense` the `weight_bytes` (all parameters and buffers).
"""

import importlib.metadata
import json
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import circuitpress  # noqa: F401 (makes from_pretrained read packed folders)
from circuitpress.files import write_bytes_atomic
from circuitpress.formats import IntCodes, IntFormat

CONTEXT = 128
LIBRARIES = ("torch", "transformers", "circuitpress")


@click.command(context_settings={"show_default": True})
@click.option("--hidden", default=2048, help="Hidden size.")
@click.option("--neurons", default=5632, help="Neurons of the MLP.")
@click.option("--blocks", default=6, help="Decoder blocks.")
@click.option("--vocabulary", default=32000, help="Tokens; embeddings are tied and stay in bfloat16.")
@click.option("--bits", default=4, type=click.IntRange(2, 8), help="Bits a weight.")
@click.option("--group-size", default=64, help="Weights that share a scale.")
@click.option("--batch", "batches", multiple=True, default=(1, 2, 4, 8), help="Sequences decoded at once; repeatable.")
@click.option("--prompt", "prompts", multiple=True, default=(64, 512), help="Tokens of a prompt; repeatable.")
@click.option("--steps", default=30, help="Timed steps of each row (a third of it for prompts).")
@click.option("--threads", default=torch.get_num_threads(), help="CPU threads.")
@click.option("--machine", default=None, help="Name in the file name; the processor and its cores if not given.")
@click.option("--out", default=Path(__file__).with_name("results"), type=click.Path(path_type=Path), help="Folder.")
def main(
    hidden: int, neurons: int, blocks: int, vocabulary: int, bits: int, group_size: int, batches: tuple[int, ...],
    prompts: tuple[int, ...], steps: int, threads: int, machine: str | None, out: Path,
) -> None:  # fmt: skip
    """Times a packed random-weight Llama against dense bfloat16 on this CPU and writes results/speed-MACHINE.json."""
    torch.set_num_threads(threads)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=neurons, num_hidden_layers=blocks, vocab_size=vocabulary,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 512), tie_word_embeddings=True,
        dtype="bfloat16",
    )  # fmt: skip
    name = f"llama-random-{hidden}x{blocks}"
    packed_as = IntFormat(bits, group_size)
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"dense bfloat16": Path(scratch, "dense"), f"circuitpress {packed_as.name}": Path(scratch, "packed")}
        dense, packed = folders
        stored_bits = write_folders(config, packed_as, *folders.values())
        peaks = {method: peak_bytes(folder, threads) for method, folder in folders.items()}
        models = {method: load(folder) for method, folder in folders.items()}
        rows: list[dict[str, Any]] = []
        for phase, batch in [("decode", batch) for batch in batches] + [("prefill", prompt) for prompt in prompts]:
            step = decode_step if phase == "decode" else prefill_step
            count = steps if phase == "decode" else max(3, steps // 3)
            times = interleave({method: step(model, batch) for method, model in models.items()}, count)
            ratio = statistics.median(a / b for a, b in zip(times[packed], times[dense], strict=True))
            for method, model in models.items():
                rows.append({
                    "model": name, "method": method, "phase": phase, "batch": batch, "threads": threads,
                    "bits_per_weight": stored_bits if method == packed else 16.0,
                    "tokens_per_second": batch / statistics.median(times[method]),
                    "ratio_to_dense": ratio if method == packed else 1.0,
                    "peak_bytes": peaks[method], "weight_bytes": weight_bytes(model),
                    "memory_ratio_to_dense": weight_bytes(model) / weight_bytes(models[dense]),
                })  # fmt: skip
                click.echo(json.dumps(rows[-1]))
    machine = machine or machine_name()
    document = {
        "commit": commit(), "machine": machine, "command": shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]]),
        "versions": {library: importlib.metadata.version(library) for library in LIBRARIES}, "rows": rows,
    }  # fmt: skip
    path = out / f"speed-{machine}.json"
    write_bytes_atomic(path, (json.dumps(document, indent=1) + "\n").encode())
    click.echo(str(path), err=True)


def write_folders(config: LlamaConfig, packed_as: IntFormat, dense: Path, packed: Path) -> float:
    """Writes the model dense and packed; returns stored bits a weight of the decoder's linear layers."""
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(dense)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    modules: dict[str, Any] = {}
    stored = numel = 0
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if not isinstance(module, torch.nn.Linear):
            continue
        weight = state.pop(f"{name}.weight")
        rows, cols = weight.shape
        for tensor, content in packed_as.pack(min_max(weight, packed_as)).items():
            state[f"{name}.{tensor}"] = content
        segment = {"format": packed_as.name, "start": 0, "stop": rows}
        modules[name] = {"shape": [rows, cols], "axis": "rows", "segments": [segment]}
        stored, numel = stored + packed_as.nbytes(rows, cols), numel + rows * cols
    packed.mkdir()
    save_file(state, packed / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "circuitpress", "version": 1, "modules": modules}
    text = json.dumps(json.loads((dense / "config.json").read_text()) | {"quantization_config": quantization})
    (packed / "config.json").write_text(text)
    return 8 * stored / numel


def min_max(weight: torch.Tensor, packed_as: IntFormat) -> IntCodes:
    """Codes on the grid between the smallest and the largest weight of each group; cols must divide into groups."""
    groups = weight.float().view(weight.shape[0], -1, packed_as.group_size)
    top = 2**packed_as.bits - 1
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = ((high - low) / top).clamp(min=1e-6).half()
    zeros = (-low / scales.float()).round().clamp(0, top)
    codes = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, top)
    return IntCodes(codes.view(weight.shape).to(torch.uint8), scales, zeros.to(torch.uint8))


def load(folder: Path) -> PreTrainedModel:
    """The model in bfloat16 on the CPU."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def decode_step(model: PreTrainedModel, batch: int) -> Callable[[], None]:
    """A call decodes one token for each of `batch` sequences behind the same CONTEXT tokens."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.arange(batch * CONTEXT).view(batch, -1) % model.config.vocab_size, past_key_values=cache)
    token = torch.ones(batch, 1, dtype=torch.long)

    def step() -> None:
        with torch.no_grad():
            model(token, past_key_values=cache)
        cache.crop(-1)

    return step


def prefill_step(model: PreTrainedModel, tokens: int) -> Callable[[], None]:
    """A call reads one prompt of `tokens` tokens."""
    prompt = torch.arange(tokens)[None] % model.config.vocab_size

    def step() -> None:
        with torch.no_grad():
            model(prompt, logits_to_keep=1)

    return step


def interleave(steps: dict[str, Callable[[], None]], count: int) -> dict[str, list[float]]:
    """Seconds of `count` calls of each step, in turn, after two that are not counted."""
    times: dict[str, list[float]] = {method: [] for method in steps}
    for _ in range(count + 2):
        for method, step in steps.items():
            start = time.perf_counter()
            step()
            times[method].append(time.perf_counter() - start)
    return {method: values[2:] for method, values in times.items()}


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def peak_bytes(folder: Path, threads: int) -> int:
    """Peak resident memory of loading a model and decoding a token, in a fresh process, less that of the libraries."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_bytes, (folder, threads))


def _peak_bytes(folder: Path, threads: int) -> int:
    torch.set_num_threads(threads)
    before = resident_peak()
    decode_step(load(folder), 1)()
    return resident_peak() - before


def resident_peak() -> int:
    """The most resident memory that this process had so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss starts at what the parent process had
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])  # pyright: ignore[reportOptionalSubscript]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine_name() -> str:
    """The processor's name and its cores, fit for a file name: such as `amd-epyc-2-cores`."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    named = re.search(r"model name\s*:\s*(.+)", text)
    name = named[1] if named else platform.processor() or platform.machine()
    cores = len(re.findall(r"^processor\s*:", text, re.MULTILINE)) or 1
    return f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{cores}-cores"


def commit() -> str | None:
    """The commit that is measured, None outside a repository."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


if __name__ == "__main__":
    main()
