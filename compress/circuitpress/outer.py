"""Embedding and lm_head: what each format of theirs costs, and how they are rounded.

They are outside the decoder blocks, so a walk over blocks never sees them; in small models they are most of the bytes.
With dW = Q(W) - W and all means over tokens:

1. **lm_head** changes the logits by d = dW x. With labels drawn from the model's softmax p the gradient there is
   p - onehot(label), and the mean of (g . d)^2 over labels is exactly the variance of d under p, so nothing is drawn:

       price = 1/2 E_t Var_p(d_t)

   It is rounded with feedback and H = E[s x x^T], s the mean of p (1 - p) over the vocabulary.
2. **The embedding** changes the input of block 0 by a row of dW: price = 1/2 E_t (g_t . dW[id_t])^2, g from the end
   of the backward walk. Rows are looked up, not multiplied, but their errors go through g all the same, so
   H = E[g g^T] / vocab takes the place of the inputs' second moment.
3. **Tied**, one change acts at both ends: price = 1/2 E_t [(a_t + b_t)^2], a at the input and b = g . d at the logits,
   with the labels that drew g (b^2 by its closed form). It is rounded with the sum of both H: each is a mean over the
   rows, so they are in one unit.

The statistics of one walk are one shard, from which `apply` rounds again without any walk.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save
from torch import Tensor

from .anatomy import Anatomy, Matrix
from .files import write_bytes_atomic
from .formats import parse
from .quantize import Quantized, quantize_everywhere
from .score.fisher import LOGIT_CHUNK, add_second_moment, draw_labels, label_noise
from .segments import whole
from .store import Store
from .stream import Stream
from .units import OUTER, Group, Prices

MOST_TOKENS = 1 << 12
"""Tokens that lm_head is priced on: beyond that, a large vocabulary would cost as much as the blocks. On so many the
standard error of a price is 3 to 5 % (lab model of 14 M, seven formats)."""

_STRIPE = 1 << 13
"""Rows that are rounded at once; a multiple of 8, so that packed stripes join without padding."""


def outer_groups(anatomy: Anatomy) -> tuple[Group, ...]:
    """Embedding and lm_head, or the one matrix that is both."""
    return tuple(whole(matrix, OUTER) for matrix in anatomy.outer)


def outer_batches(batches: Sequence[Tensor]) -> int:
    """How many micro-batches embedding and lm_head are priced on: MOST_TOKENS tokens, but at least one."""
    return max(1, sum(total <= MOST_TOKENS for total in accumulate(ids.numel() for ids in batches)))


def outer_path(folder: Path) -> Path:
    """The shard of embedding and lm_head in a folder of price shards."""
    return folder / "outer.safetensors"


@torch.no_grad()
def price_outer(
    stream: Stream, batches: Sequence[Tensor], finals: Store, gradients: Store, *, formats: Sequence[str], draws: int,
    seed: int, folder: Path,
) -> None:  # fmt: skip
    """Prices embedding and lm_head and writes their shard.

    `batches` are the token ids that were walked, `finals` holds the outputs of the last block under batch b,
    `gradients` those at the input of block 0 under (b, draw).
    """
    flows = list(_flows(stream, batches, finals, gradients, draws, seed))
    vocab = stream.anatomy.vocab
    moments = {end: torch.zeros(stream.anatomy.hidden, stream.anatomy.hidden, device=stream.device) for end in _ENDS}
    tokens = sum(flow["ids"].numel() for flow in flows)
    for flow in flows:
        for logits, span in _logits(stream, flow["x"]):
            p = logits.softmax(-1)
            spread = (1 - p.square().sum(-1)).clamp(min=0) / vocab
            add_second_moment(moments["head"], flow["x"][span], spread / tokens)
        g = flow["g"].flatten(0, 1)
        share = torch.full((len(g),), 1 / (tokens * draws * vocab), device=g.device)
        add_second_moment(moments["embedding"], g, share)
    moments["tied"] = moments["head"] + moments["embedding"]
    arrays: dict[str, NDArray[Any]] = {}
    notes: dict[str, str] = {}
    columns: list[list[tuple[NDArray[np.float64], NDArray[np.float64]]]] = []
    for matrix in stream.anatomy.outer:
        weight, hessian = stream.outer_weight(matrix.module), moments[matrix.role]
        arrays[f"hessian.{matrix.module}"] = hessian.cpu().numpy()
        columns.append([])
        for form in formats:
            rounded = round_outer(weight, hessian, form, polish=False)
            if rounded.fallback:
                notes[matrix.module] = rounded.fallback
            columns[-1].append(_effects(stream, matrix, flows, _change(weight, rounded)))
    token, sequence = (np.array([[pair[k] for pair in row] for row in columns]).transpose(2, 0, 1) for k in (0, 1))
    n = len(token)
    arrays["nats"], arrays["nats_sequence"] = token.mean(0), sequence.mean(0)
    arrays["stderr"] = token.std(0, ddof=1) / np.sqrt(n) if n > 1 else np.full(token.shape[1:], np.inf)
    metadata = {"formats": json.dumps(list(formats)), "notes": json.dumps(notes)}
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(outer_path(folder), save(arrays, metadata=metadata))


def load_outer(anatomy: Anatomy, folder: Path) -> Prices | None:
    """The prices of embedding and lm_head in a folder of price shards; None if they were not priced."""
    if not outer_path(folder).exists():
        return None
    arrays = load_file(outer_path(folder))
    with safe_open(outer_path(folder), framework="np") as file:
        metadata = file.metadata()
    formats, groups = tuple(json.loads(metadata["formats"])), outer_groups(anatomy)
    return Prices(
        groups,
        formats,
        outer_bytes(groups, formats),
        arrays["nats"],
        arrays["nats_sequence"],
        arrays["stderr"],
        provenance={"fallbacks": json.loads(metadata["notes"])},
    )


def outer_bytes(groups: Sequence[Group], formats: Sequence[str]) -> NDArray[np.int64]:
    """Stored bytes [groups, formats]."""
    sizes = [[sum(parse(f).nbytes(s.rows, s.cols) for s in group.segments) for f in formats] for group in groups]
    return np.array(sizes, dtype=np.int64)


def load_hessian(folder: Path, module: str) -> Tensor:
    """The Hessian [hidden, hidden] that `module` was rounded with."""
    with safe_open(outer_path(folder), framework="pt") as file:
        return file.get_tensor(f"hessian.{module}")


def round_outer(weight: Tensor, hessian: Tensor, form: str, *, polish: bool = True) -> Quantized:
    """Rounds `weight` [vocab, hidden] to the format `form`, a stripe of rows at a time.

    Prices are made without `polish`, like those of blocks.
    """
    parts, notes = [], set()
    for start in range(0, len(weight), _STRIPE):
        stripe = weight[start : start + _STRIPE].float()
        rounded, note = quantize_everywhere(stripe, hessian, [form], polish=polish)
        ((kind, _, rows, value),) = rounded[form].parts
        parts.append((kind, start, start + rows, value))
        notes.add(note)
    return Quantized((weight.shape[0], weight.shape[1]), "rows", tuple(parts), "; ".join(sorted(notes - {""})))


_ENDS = ("embedding", "head")
_Flow = Mapping[str, Tensor]
"""One micro-batch: ids [n, length]; x [tokens, hidden] that lm_head reads; g and labels [draws, tokens, ...]."""


def _flows(
    stream: Stream, batches: Sequence[Tensor], finals: Store, gradients: Store, draws: int, seed: int
) -> Iterator[_Flow]:
    sequence = 0
    for b, ids in enumerate(batches[: outer_batches(batches)]):
        x = stream.normed(finals.get((0, b), stream.device)).flatten(0, 1)
        labels = torch.empty(draws, ids.shape[0], ids.shape[1], dtype=torch.long, device=stream.device)
        for draw in range(draws):
            for row in range(ids.shape[0]):
                noise = label_noise(seed, sequence + row, draw, ids.shape[1]).to(stream.device)
                own = x.view(*ids.shape, -1)[row]
                drawn = [draw_labels(logits, noise[span]) for logits, span in _logits(stream, own)]
                labels[draw, row] = torch.cat(drawn)
        sequence += ids.shape[0]
        g = torch.stack([gradients.get((b, draw), stream.device).flatten(0, 1) for draw in range(draws)])
        yield {"ids": ids.to(stream.device), "x": x, "g": g, "labels": labels.flatten(1)}


def _logits(stream: Stream, x: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Logits float32 [some, vocab] for normed states x [tokens, hidden], a chunk at a time, and where they lie."""
    step = max(1, LOGIT_CHUNK // stream.anatomy.vocab)
    for at in range(0, len(x), step):
        yield stream.head(x[at : at + step]).float(), slice(at, at + step)


def _change(weight: Tensor, rounded: Quantized) -> Tensor:
    """Q(W) - W [vocab, hidden] in the type of `weight`: a stripe at a time, for there are large vocabularies."""
    change = torch.empty_like(weight)
    for form, start, stop, value in rounded.parts:
        change[start:stop] = (form.decode(value) - weight[start:stop].float()).to(weight.dtype)
    return change


def _effects(
    stream: Stream, matrix: Matrix, flows: Sequence[_Flow], change: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Per-token and per-sequence prices [windows] of changing one matrix."""
    if not change.any():  # a format that holds what the checkpoint does
        nothing = np.zeros(sum(len(flow["ids"]) for flow in flows))
        return nothing, nothing
    token, sequence = [], []
    for flow in flows:
        shape, draws = flow["ids"].shape, len(flow["g"])
        a = b = torch.zeros(flow["labels"].shape, dtype=torch.float64, device=stream.device)
        variance = a[0]
        if matrix.role != "embedding":
            b, variance = _output_effects(stream, flow, change)
        if matrix.role != "head":
            rows = change[flow["ids"].flatten()]
            a = torch.stack([(g * rows).float().sum(-1).double() for g in flow["g"]])
        squares = (a.square() + 2 * a * b).mean(0) + variance
        token.append(0.5 * squares.view(shape).mean(1))
        a_sum, b_sum = (part.view(draws, *shape).sum(2) for part in (a, b))
        per_sequence = (a_sum.square() + 2 * a_sum * b_sum).mean(0) + variance.view(shape).sum(1)
        sequence.append(0.5 * per_sequence / shape[1])
    return torch.cat(token).cpu().numpy(), torch.cat(sequence).cpu().numpy()


def _output_effects(stream: Stream, flow: _Flow, change: Tensor) -> tuple[Tensor, Tensor]:
    """g . d [draws, tokens] for the drawn labels, and the variance of d under the softmax [tokens]."""
    drawn, variance = [], []
    for logits, span in _logits(stream, flow["x"]):
        p = logits.softmax(-1)
        d = (flow["x"][span] @ change.T).float()
        mean = (p * d).sum(-1)
        drawn.append((mean - d.gather(1, flow["labels"][:, span].T).T).double())
        variance.append((p * (d - mean[:, None]).square()).sum(-1).double())
    return torch.cat(drawn, 1), torch.cat(variance)
