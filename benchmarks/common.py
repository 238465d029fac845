"""What the benchmarks share: results files with provenance, readable texts, models with swapped weights."""

import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends.cpu import get_cpu_capability

from circuitpress.files import write_bytes_atomic
from circuitpress.stream import Stream


def save_results(path: Path, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """Writes one results file with the commit, machine, versions and command that made it, and what `more` says."""
    document = {
        "commit": commit(),
        "machine": ", ".join([platform.machine(), f"{torch.get_num_threads()} threads", get_cpu_capability()]),
        "versions": {name: version(name) for name in ("circuitpress", "torch", "transformers", "numpy", "scipy")},
        "command": command_line(),
        **more,
    }
    body = ",\n  ".join(json.dumps(row) for row in rows)
    text = json.dumps(document, indent=1)[:-2] + ',\n "rows": [\n  ' + body + "\n ]\n}\n"
    write_bytes_atomic(path, text.encode())


def commit() -> str:
    """The commit that is checked out, marked if files differ from it."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent.parent, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    return found.stdout.strip() or "unknown"


def command_line() -> str:
    """How this process was called. Of paths only the last two parts: enough to find the asset, no machine's layout."""
    return " ".join(["python", *(_short(argument) for argument in sys.argv)])


def load_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file, none if it does not exist."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def _short(argument: str) -> str:
    path = Path(argument)
    if not path.is_absolute():
        return argument
    here = Path(__file__).parent.parent
    return str(path.relative_to(here)) if path.is_relative_to(here) else "/".join(["...", *path.parts[-2:]])


def readable_text(path: Path, tokenizer: Any, folder: Path) -> Path:
    """`path`, or a copy in `folder` without line breaks for a tokenizer that has none (babyllama-105)."""
    if (
        tokenizer.unk_token_id is None
        or tokenizer.unk_token_id not in tokenizer("\n", add_special_tokens=False).input_ids
    ):
        return path
    copy = folder / path.name
    copy.write_text(path.read_text().replace("\n", " "))
    return copy


def dense_copy(stream: Stream, weights: Sequence[Mapping[str, Tensor]], model: nn.Module) -> nn.Module:
    """Puts the matrices [rows, cols] of every block (local names) into a full transformers model."""
    state = dict(model.named_parameters())
    with torch.no_grad():
        for place, block in zip(stream.anatomy.blocks, weights, strict=True):
            for name, weight in block.items():
                parameter = state[f"{place.prefix}.{name}.weight"]
                parameter.copy_(weight.T if place.matrices[0].transposed else weight)
    return model


@torch.no_grad()
def minimal_pairs(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, str]], bos: int | None) -> Tensor:
    """log p(good) - log p(bad) in nats for each pair of sentences (BLiMP's score; positive is right)."""
    scores = [torch.cat(list(_log_probability(model, tokenizer, [row[key] for row in rows], bos))) for key in _PAIR]
    return scores[0] - scores[1]


_PAIR = ("sentence_good", "sentence_bad")


def _log_probability(model: Any, tokenizer: Any, sentences: Sequence[str], bos: int | None) -> Iterator[Tensor]:
    start = [] if bos is None else [bos]
    ids = [start + tokenizer(sentence, add_special_tokens=False).input_ids for sentence in sentences]
    for at in range(0, len(ids), 64):
        part = ids[at : at + 64]
        padded = torch.zeros(len(part), max(map(len, part)), dtype=torch.long)
        mask = torch.zeros_like(padded)
        for i, row in enumerate(part):
            padded[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        logits = model(padded, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
        chosen = logits[:, :-1].gather(2, padded[:, 1:, None])[..., 0]
        yield (chosen * mask[:, 1:]).sum(1)
