"""The judge: decoded weights of every method, one after another in our own evaluator, against the same reference.

Nobody's forward pass is trusted, ours included: each method hands in float32 matrices, which replace those of the
float32 model while a block is resident. All methods of a handful walk up the model together (score/variants.py).

A verdict is kept beside the weights, in a file named by the digest of what was judged on what: to judge takes longer
than most methods do.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..anatomy import Anatomy, Block
from ..console import Advance, ignore
from ..errors import CheckpointError
from ..evaluate.divergence import Divergence
from ..files import sha256, write_bytes_atomic
from ..hooks import replace
from ..score.variants import Edit, measure
from ..stream import Stream
from .jobs import checkpoint_digest
from .padding import padding_is_silent

TOGETHER = 8
"""Variants in one walk: each keeps hidden states of all windows, 25 MB for 64 windows of 256 tokens 384 wide."""


def judge(
    stream: Stream, windows: Tensor, weights: Mapping[str, Path], *, advance: Advance = ignore
) -> dict[str, Divergence]:
    """The divergence on `windows` int64 [n, length] of every label of `weights`, files as `jobs.Outcome` has them."""
    kept = {label: _verdict(stream, windows, path) for label, path in weights.items()}
    found = {label: _recall(path) for label, path in kept.items() if path.exists()}
    for labels in _batched([label for label in weights if label not in found], TOGETHER):
        chosen = {label: weights[label] for label in labels}
        part = len(labels) / len(weights)
        judged = measure(
            stream, windows, _edits(stream, chosen), advance=lambda n, note, part=part: advance(n * part, note)
        )
        for label, divergence in judged.items():
            write_bytes_atomic(kept[label], json.dumps(asdict(divergence)).encode())
        found |= judged
    return {label: found[label] for label in weights}


def check(anatomy: Anatomy, path: Path) -> None:
    """CheckpointError if padded neurons of the decoded weights at `path` could add something to a block's output."""
    for block in anatomy.blocks:
        if not padding_is_silent(block, _read(path, block)):
            raise CheckpointError(f"padded neurons of block {block.index} did not stay zero: {path.parent.name}")


def _verdict(stream: Stream, windows: Tensor, path: Path) -> Path:
    digest = hashlib.sha256(windows.contiguous().numpy().tobytes())
    digest.update("".join([checkpoint_digest(stream.anatomy.folder), sha256(path)]).encode())
    return path.parent / f"verdict-{digest.hexdigest()[:16]}.json"


def _recall(path: Path) -> Divergence:
    return Divergence(**json.loads(path.read_text()))


def _batched(labels: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for at in range(0, len(labels), size):
        yield labels[at : at + size]


def _edits(
    stream: Stream, weights: Mapping[str, Path]
) -> Callable[[int, nn.Module, Callable[[int], Tensor]], Mapping[str, Edit]]:
    def edits(index: int, module: nn.Module, inputs: Callable[[int], Tensor]) -> Mapping[str, Edit]:
        del inputs
        place = stream.anatomy.blocks[index]
        return {label: partial(_replaced, module, place, path) for label, path in weights.items()}

    return edits


@contextmanager
def _replaced(module: nn.Module, place: Block, path: Path) -> Iterator[None]:
    found = _read(path, place)
    local = {
        place.local(matrix): found[matrix.module][: matrix.rows, : matrix.cols]
        for matrix in place.matrices
        if matrix.module in found
    }
    with replace(module, local, transposed=place.matrices[0].transposed):
        yield


def _read(path: Path, place: Block) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        return {m.module: file.get_tensor(m.module) for m in place.matrices if m.module in names}
