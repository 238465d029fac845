"""What `inspect` shows: one json-ready document a view, each with its kind of evidence and what it cannot prove.

| view | module | reads |
|---|---|---|
| lens | logits | the residual stream through the unembedding, by depth |
| attention | attention | patterns on repeated random tokens, and the scores that name heads |
| residual | residual | norms, and who wrote the final stream |
| weights | spectra | OV and QK circuits from the weights alone |
| text | ..examples | the text on which the most active heads and neurons peak |
| probe | probe | what is linearly decodable, with a control |
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ...console import Advance, ignore
from ...stream import Stream
from ...units import UnitId
from ..examples import of_units
from ..sites import read, walk
from .attention import head_scores, patterns, repeated
from .logits import logit_lens
from .probe import probe_stream
from .residual import residual
from .spectra import HeadWeights, spectra

View = Literal["lens", "attention", "residual", "weights", "text", "probe"]
VIEWS: tuple[View, ...] = get_args(View)

CANNOT_PROVE: dict[View, str] = {
    "lens": "It reads the residual stream alone, in the basis of the last layer: what later blocks still have to move "
    "or rotate is invisible, so a high KL does not mean that nothing is known yet.",
    "attention": "Attention weights say where a head looks, not what it moves or whether anything uses it: heads with "
    "a perfect induction pattern can be removed without effect. Only ablation or patching shows that.",
    "residual": "A part that writes much of the stream need not be needed: norms and shares rank loud distractors "
    "above quiet circuits. Only ablation shows what a part is needed for.",
    "weights": "Weights say what a head could read and write; positions, norms and the activations that occur decide "
    "what it does.",
    "text": "The extreme end of a part's range on this text; it does not say what the model does with the part, and "
    "most of its activity lies elsewhere.",
    "probe": "What a linear map can decode need not be used by the model; near the control it is memory of tokens.",
}

SEGMENT = 32
_SEQUENCES = 32
_SHOWN = 0.1
"""The score from which a head's pattern is worth a picture."""


@dataclass(frozen=True)
class Subject:
    """What is looked at: the model, windows int64 [n, length] of text, how to print a token, its BOS id if windows
    begin with one, and ids that no text contains."""

    stream: Stream
    windows: Tensor
    decode: Callable[[int], str]
    bos: int | None = None
    special: tuple[int, ...] = ()
    seed: int = 0


def look(view: View, subject: Subject, *, units: Sequence[UnitId] = (), advance: Advance = ignore) -> dict[str, Any]:
    """The document of one view; `units` are the parts of view `text` (default: the most active ones)."""
    found = {"lens": _lens, "attention": _attention, "residual": _residual, "weights": _weights, "probe": _probe}
    rows = _text(subject, units, advance) if view == "text" else found[view](subject, advance)
    n, length = subject.windows.shape
    head = {
        "view": view,
        "model": subject.stream.anatomy.folder.resolve().name,
        "evidence": "correlational",
        "cannot_prove": CANNOT_PROVE[view],
        "windows": n,
        "length": length,
    }
    return head | rows


def _lens(subject: Subject, advance: Advance) -> dict[str, Any]:
    shown = range(max(0, subject.windows.shape[1] - 8), subject.windows.shape[1])
    depths, guesses = logit_lens(subject.stream, subject.windows, shown=shown, advance=advance)
    read_ids = subject.windows[0].tolist()
    rows = [
        asdict(guess) | {"text": subject.decode(guess.token), "after": subject.decode(read_ids[guess.position])}
        for guess in guesses
    ]
    return {"depths": [asdict(depth) for depth in depths], "guesses": rows}


def _attention(subject: Subject, advance: Advance) -> dict[str, Any]:
    stream = subject.stream
    usable = stream.anatomy.vocab - len({*subject.special, subject.bos} - {None})
    room = (stream.anatomy.context or 2 * SEGMENT + 1) - (subject.bos is not None)
    segment = max(2, min(SEGMENT, usable, room // 2))
    ids = repeated(
        stream.anatomy.vocab, segment=segment, samples=_SEQUENCES, seed=subject.seed, first=subject.bos,
        avoid=subject.special,
    )  # fmt: skip
    rows = [asdict(score) for score in head_scores(stream, ids, segment, advance=advance)]
    chosen: dict[tuple[int, int], str] = {}
    for why in ("previous_token", "induction", "duplicate", "first_position"):
        best = sorted(rows, key=lambda row: -row[why])
        for row in [row for row in best[:2] if row[why] > _SHOWN] or best[:1]:
            chosen.setdefault((row["layer"], row["head"]), why)
    mean = patterns(stream, ids[:1], advance=advance)
    shown = [
        {"layer": layer, "head": head, "why": f"{why} {_value(rows, layer, head, why):.2f}"}
        | {"weights": [[round(value, 4) for value in row] for row in mean[layer, head].tolist()]}
        for (layer, head), why in sorted(chosen.items())
    ]
    return {"segment": segment, "sequences": len(ids), "heads": rows, "patterns": shown}


def _value(rows: Sequence[dict[str, Any]], layer: int, head: int, name: str) -> float:
    return next(row[name] for row in rows if (row["layer"], row["head"]) == (layer, head))


def _residual(subject: Subject, advance: Advance) -> dict[str, Any]:
    return {"parts": [asdict(row) for row in residual(subject.stream, subject.windows, advance=advance)]}


def _weights(subject: Subject, advance: Advance) -> dict[str, Any]:
    found = spectra(subject.stream, advance=advance)
    heads = [
        {
            "layer": row.layer,
            "head": row.head,
            "copying": row.copying,
            "ov": row.ov.tolist(),
            "qk": row.qk.tolist(),
            "ov_effective": HeadWeights.effective(row.ov),
            "qk_effective": HeadWeights.effective(row.qk),
        }
        for row in found.heads
    ]
    pairs = [
        {
            "writer": "L{}H{}".format(*row.writer),
            "reader": "L{}H{}".format(*row.reader),
            "through": name,
            "score": value,
        }
        for row in found.pairs
        for name, value in (("q", row.q), ("k", row.k), ("v", row.v))
    ]
    strongest = sorted(pairs, key=lambda row: -row["score"])[:15]
    chance = subject.stream.anatomy.hidden**-0.5
    return {"heads": heads, "strongest": strongest, "random_composition": chance, "pairs": pairs}


def _probe(subject: Subject, advance: Advance) -> dict[str, Any]:
    found = probe_stream(subject.stream, subject.windows, advance=advance)
    rows = [asdict(row) | {"selectivity": row.selectivity} for row in found]
    return {"task": "is the previous token a common one?", "places": rows}


def _text(subject: Subject, units: Sequence[UnitId], advance: Advance) -> dict[str, Any]:
    chosen = list(units) or _loudest(subject, advance)
    rows = of_units(subject.stream, subject.windows, chosen, seed=subject.seed, count=4, advance=advance)
    return {"parts": [row.to_json(subject.decode) for row in rows]}


@torch.no_grad()
def _loudest(subject: Subject, advance: Advance) -> list[UnitId]:
    """In up to six layers spread over the model, the head and the neuron whose peak is highest over their mean."""
    stream = subject.stream
    layers = sorted({round(i * (stream.depth - 1) / 5) for i in range(6)})
    sizes: dict[tuple[int, str], list[Tensor]] = {}

    def visit(index: int, module: nn.Module, _: int, hidden: Tensor) -> Tensor:
        found, output = read(stream, index, module, hidden, ["head_out", "neurons"])
        if index in layers:
            heads = found["head_out"].unflatten(-1, (stream.anatomy.blocks[index].heads, -1)).norm(dim=-1)
            for kind, value in (("head", heads), ("neuron", found["neurons"].abs())):
                later = value[:, 1:].flatten(0, 1)
                sizes.setdefault((index, kind), []).append(torch.stack([later.max(0).values, later.mean(0)]))
        return output

    walk(stream, stream.batches(subject.windows), visit, advance=advance).clear()
    chosen = []
    for (layer, kind), rows in sorted(sizes.items()):
        peak, mean = torch.stack([row[0] for row in rows]).amax(0), torch.stack([row[1] for row in rows]).mean(0)
        # A part that is hardly ever on would win with any peak at all: the mean over all parts is added below.
        best = int((peak / (mean + mean.mean() + 1e-30)).argmax())
        chosen.append(UnitId(layer, kind, best))  # pyright: ignore[reportArgumentType]
    return chosen
