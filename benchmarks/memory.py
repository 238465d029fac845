"""How much memory does pricing take on a model that is larger than what may be resident?

A random-weight Llama of 1.1 billion parameters (the shape of TinyLlama) is written to disk in bfloat16, a block at a
time, and priced for int4 in a fresh process. Reported are the seconds and the peak resident memory of that process, and
what is left of the peak without one block, the embeddings (embedding and lm_head) and the block inputs held in memory.

    python benchmarks/memory.py --out benchmarks/results/memory.json
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file

from common import save_results

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


@click.command()
@click.option("--blocks", default=22, show_default=True, help="fewer blocks for a quick look")
@click.option("--windows", default=8, show_default=True)
@click.option("--length", default=512, show_default=True)
@click.option("--model", type=click.Path(path_type=Path), help="keep (and reuse) the random checkpoint here")
@click.option("--worker", type=click.Path(path_type=Path), hidden=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/memory.json"))
def main(blocks: int, windows: int, length: int, model: Path | None, worker: Path | None, out: Path) -> None:
    """Prices a random 1.1 B model for int4 and reports peak memory and seconds."""
    if worker is not None:
        click.echo(json.dumps(_price(worker, windows, length)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = model or Path(scratch) / "model"
        if not (folder / "config.json").exists():
            write_random_model(folder, blocks)
        command = [
            sys.executable,
            __file__,
            "--worker",
            str(folder),
            "--windows",
            str(windows),
            "--length",
            str(length),
        ]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    save_results(out, [row])
    click.echo(json.dumps(row, indent=1))


def write_random_model(folder: Path, blocks: int) -> None:
    """Writes a checkpoint of this shape with `blocks` blocks, one at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    hidden, neurons, vocab = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    kv = hidden // SHAPE["num_attention_heads"] * SHAPE["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (neurons, hidden),
        "mlp.up_proj": (neurons, hidden),
        "mlp.down_proj": (hidden, neurons),
    }
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).bfloat16()

    index: dict[str, str] = {}

    def save(tensors: dict[str, torch.Tensor], name: str) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    outer = {"model.embed_tokens.weight": random(vocab, hidden), "lm_head.weight": random(vocab, hidden)}
    save(outer | {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}, "model-outer.safetensors")
    for i in range(blocks):
        tensors = {f"model.layers.{i}.{name}.weight": random(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        save(tensors, f"model-{i:05d}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": blocks}))


def _price(folder: Path, windows: int, length: int) -> dict[str, Any]:
    from circuitpress.price import price
    from circuitpress.stream import open_stream

    stream = open_stream(folder, spill=folder / "spill")
    anatomy = stream.anatomy
    ids = torch.randint(anatomy.vocab, (windows, length), generator=torch.Generator().manual_seed(1))
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as shards:
        _, prices = price(stream, ids, formats=["int4g64"], folder=Path(shards))
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    width = stream.dtype.itemsize
    block = width * anatomy.linear_numel // len(anatomy.blocks)
    embeddings = width * anatomy.hidden * anatomy.vocab * (1 if anatomy.tied else 2)
    saved = min(stream.store("x").limit, width * anatomy.hidden * ids.numel() * len(anatomy.blocks))
    return {
        "model": f"random Llama, {anatomy.linear_numel / 1e9:.2f} B linear weights, {anatomy.dtype}",
        "tokens": ids.numel(),
        "compute": str(stream.dtype),
        "predicted_kl": float(prices.nats.sum()),
        "seconds": seconds,
        "peak_bytes": peak,
        "block_bytes": block,
        "embedding_bytes": embeddings,
        "saved_input_bytes": saved,
        "rest_bytes": peak - block - embeddings - saved,
    }


if __name__ == "__main__":
    main()
