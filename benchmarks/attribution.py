"""How much memory and time does attribution take on a model of a billion parameters?

The random-weight Llama of `memory.py` (22 blocks, width 2048) in bfloat16, and contrast pairs of random tokens. In a
fresh process, integrated gradients over inputs (5 midpoints) score all heads and neurons. Reported are seconds, the
peak resident memory, that peak without the resident block, the embeddings and the interpreter with torch and
transformers loaded, and what is kept for a token: hidden states between blocks for all 7 runs, and activations at the
sites of one block.

    python benchmarks/attribution.py --out benchmarks/results/attribution.json
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch

from common import save_results
from memory import write_random_model

STEPS = 5


@click.command()
@click.option("--blocks", default=22, show_default=True, help="fewer blocks for a quick look")
@click.option("--pairs", default=2, show_default=True)
@click.option("--length", default=128, show_default=True)
@click.option("--model", type=click.Path(path_type=Path), help="keep (and reuse) the random checkpoint here")
@click.option("--worker", type=click.Path(path_type=Path), hidden=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/attribution.json"))
def main(blocks: int, pairs: int, length: int, model: Path | None, worker: Path | None, out: Path) -> None:
    """Scores a random 1.1 B model and reports peak memory and seconds."""
    if worker is not None:
        click.echo(json.dumps(score(worker, pairs, length)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = model or Path(scratch) / "model"
        if not (folder / "config.json").exists():
            write_random_model(folder, blocks)
        command = [sys.executable, __file__, "--worker", str(folder), "--pairs", str(pairs), "--length", str(length)]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    save_results(out, [row])
    click.echo(json.dumps(row, indent=1))


def score(folder: Path, pairs: int, length: int) -> dict[str, Any]:
    """Runs in a process of its own, so that the peak is this work's."""
    from circuitpress.behaviors import Behavior, Pairs
    from circuitpress.score.gradients import integrated_gradients
    from circuitpress.stream import open_stream

    torch.set_num_threads(1)
    import transformers.models.llama.modeling_llama  # noqa: F401 (what every process that opens a model loads)

    loaded = memory_of_process()
    stream = open_stream(folder)
    anatomy = stream.anatomy
    draw = torch.Generator().manual_seed(1)
    clean = torch.randint(anatomy.vocab, (pairs, length), generator=draw)
    corrupted = clean.clone()
    corrupted[:, 1 : length // 2] = torch.randint(anatomy.vocab, (pairs, length // 2 - 1), generator=draw)
    answer, wrong = torch.randint(anatomy.vocab, (2, pairs), generator=draw)
    behavior = Behavior(
        "random", "logit_diff", Pairs(clean, corrupted, torch.full((pairs,), length - 1), answer, wrong)
    )
    start = time.monotonic()
    scores = integrated_gradients(stream, behavior, steps=STEPS)
    seconds = time.monotonic() - start
    peak = memory_of_process()
    width, place = stream.dtype.itemsize, anatomy.blocks[0]
    block = width * anatomy.linear_numel // len(anatomy.blocks)
    embeddings = width * anatomy.hidden * anatomy.vocab * (1 if anatomy.tied else 2)
    columns = place.heads * place.head_dim + place.neurons
    return {
        "model": f"random Llama, {anatomy.linear_numel / 1e9:.2f} B linear weights, {anatomy.dtype}",
        "method": scores.method,
        "steps": STEPS,
        "units": len(scores.units),
        "tokens": pairs * length,
        "compute": str(stream.dtype),
        "seconds": seconds,
        "peak_bytes": peak,
        "block_bytes": block,
        "embedding_bytes": embeddings,
        "libraries_bytes": loaded,
        "rest_bytes": peak - block - embeddings - loaded,
        "state_bytes_per_token": (STEPS + 2) * (len(anatomy.blocks) + 1) * anatomy.hidden * width,
        # z, z' and one gradient in the compute type, their mean in float32.
        "site_bytes_per_token": columns * (3 * width + 4),
    }


def memory_of_process() -> int:
    """The peak of resident bytes so far. getrusage would count what the parent held before this process began."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
