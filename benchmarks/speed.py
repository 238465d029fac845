"""How fast packed models decode on this CPU, and how much memory they take, against dense ones and bitsandbytes NF4.

1. A Llama of random weights, of about half a billion unless told otherwise, is written to a temporary folder: dense,
   and packed in each format by plain min-max rounding (speed does not depend on the values).
2. All are loaded into one process and timed in turn, step by step, so that what else the machine does falls on all
   alike; a figure is the median over the steps, a ratio the median of the ratios of neighbours.
3. Memory is measured in a process of its own for each: the most resident memory during load and decoding, less what the
   libraries took before.

Rows: phase `decode` is one token for each of `batch` sequences behind a cache of 128 tokens; `prefill` is a prompt of
`batch` tokens. `ratio_to_dense` divides times by those of dense bfloat16, `memory_ratio_to_dense` the `weight_bytes`
(all parameters and buffers).
"""

import importlib.metadata
import json
import platform
import re
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import circuitpress  # noqa: F401 (makes from_pretrained read packed folders)
from circuitpress.files import write_bytes_atomic
from circuitpress.formats import IntCodes, IntFormat
from common import command_line

CONTEXT = 128
BASELINE = "dense bfloat16"
Load = Callable[[], PreTrainedModel]
LIBRARIES = ("torch", "transformers", "circuitpress")


@click.command(context_settings={"show_default": True})
@click.option("--hidden", default=1536, help="Hidden size.")
@click.option("--neurons", default=4096, help="Neurons of the MLP.")
@click.option("--blocks", default=18, help="Decoder blocks.")
@click.option("--vocabulary", default=32000, help="Tokens; embeddings are tied and stay in bfloat16.")
@click.option("--bits", "widths", multiple=True, default=(4, 3, 2), type=click.IntRange(2, 8), help="Bits; repeatable.")
@click.option("--group-size", default=64, help="Weights that share a scale.")
@click.option("--peers/--no-peers", default=True, help="Time dense float32 and, if installed, bitsandbytes NF4 too.")
@click.option("--batch", "batches", multiple=True, default=(1, 4), help="Sequences decoded at once; repeatable.")
@click.option("--prompt", "prompts", multiple=True, default=(64,), help="Tokens of a prompt; repeatable.")
@click.option("--steps", default=30, help="Timed steps of each row (a third of it for prompts).")
@click.option("--threads", default=torch.get_num_threads(), help="CPU threads.")
@click.option("--machine", default=None, help="Name in the file name; the processor and its cores if not given.")
@click.option("--out", default=Path(__file__).with_name("results"), type=click.Path(path_type=Path), help="Folder.")
def main(
    hidden: int, neurons: int, blocks: int, vocabulary: int, widths: tuple[int, ...], group_size: int, peers: bool,
    batches: tuple[int, ...], prompts: tuple[int, ...], steps: int, threads: int, machine: str | None, out: Path,
) -> None:  # fmt: skip
    """Times packed random-weight Llamas against dense ones on this CPU and writes results/speed-MACHINE.json."""
    torch.set_num_threads(threads)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=neurons, num_hidden_layers=blocks, vocab_size=vocabulary,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 512), tie_word_embeddings=True,
        dtype="bfloat16",
    )  # fmt: skip
    name = f"llama-random-{hidden}x{blocks}"
    with tempfile.TemporaryDirectory() as scratch:
        dense = Path(scratch, "dense")
        write_dense(config, dense)
        loads: dict[str, Load] = {BASELINE: partial(load, dense)}
        bits: dict[str, float] = {BASELINE: 16.0}
        if peers:
            loads["dense float32"], bits["dense float32"] = partial(load, dense, dtype=torch.float32), 32.0
            if find_spec("bitsandbytes"):
                loads["bitsandbytes nf4"], bits["bitsandbytes nf4"] = partial(load_nf4, dense), 4.5
        for width in widths:
            form = IntFormat(width, group_size)
            method, folder = f"circuitpress {form.name}", Path(scratch, form.name)
            loads[method], bits[method] = partial(load, folder), write_packed(form, dense, folder)
        peaks = {method: peak_bytes(loader, threads) for method, loader in loads.items()}
        models = {method: loader() for method, loader in loads.items()}
        rows: list[dict[str, Any]] = []
        for phase, batch in [("decode", batch) for batch in batches] + [("prefill", prompt) for prompt in prompts]:
            step = decode_step if phase == "decode" else prefill_step
            count = steps if phase == "decode" else max(3, steps // 3)
            times = interleave({method: step(model, batch) for method, model in models.items()}, count)
            for method, model in models.items():
                ratio = statistics.median(a / b for a, b in zip(times[method], times[BASELINE], strict=True))
                rows.append({
                    "model": name, "method": method, "phase": phase, "batch": batch, "threads": threads,
                    "bits_per_weight": bits[method],
                    "tokens_per_second": batch / statistics.median(times[method]), "ratio_to_dense": ratio,
                    "peak_bytes": peaks[method], "peak_ratio_to_dense": peaks[method] / peaks[BASELINE],
                    "weight_bytes": weight_bytes(model),
                    "memory_ratio_to_dense": weight_bytes(model) / weight_bytes(models[BASELINE]),
                })  # fmt: skip
                click.echo(json.dumps(rows[-1]))
    machine = machine or machine_name()
    document = {
        "commit": commit(), "machine": machine, "command": command_line(),
        "versions": {library: importlib.metadata.version(library) for library in LIBRARIES}, "rows": rows,
    }  # fmt: skip
    path = out / f"speed-{machine}.json"
    write_bytes_atomic(path, (json.dumps(document, indent=1) + "\n").encode())
    click.echo(str(path), err=True)


def write_dense(config: LlamaConfig, folder: Path) -> None:
    """Writes a model of random weights."""
    torch.manual_seed(0)
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def write_packed(packed_as: IntFormat, dense: Path, packed: Path) -> float:
    """Packs the model of the folder `dense`; returns stored bits a weight of the decoder's linear layers."""
    model = load(dense)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    modules: dict[str, Any] = {}
    stored = numel = 0
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
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


def load(folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The model in `dtype` on the CPU."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def load_nf4(folder: Path) -> PreTrainedModel:
    """The model with the linear layers of its decoder in bitsandbytes NF4, computing in bfloat16."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
    )


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


def peak_bytes(loader: Load, threads: int) -> int:
    """Peak resident memory of loading a model and decoding a token, in a fresh process, less that of the libraries."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_bytes, (loader, threads))


def _peak_bytes(loader: Load, threads: int) -> int:
    torch.set_num_threads(threads)
    before = resident_peak()
    decode_step(loader(), 1)()
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
