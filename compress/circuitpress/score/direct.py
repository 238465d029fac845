"""Direct logit attribution: what every part writes towards the answer, by itself. Evidence: correlational.

The final residual stream is a sum of what was written to it, and at a frozen norm the logits are linear in it:

    logit(a) - logit(b) = sum_parts r_part . v + beta . u        u = W_U[a] - W_U[b]
    v = s gamma * u (RMSNorm),  v = s C(gamma * u) (LayerNorm: C takes the mean away)

with s = 1/rms or 1/std of the final residual at the position. Parts are the embedding, every head (its z through its
columns of W_O), every neuron (through its column of W_down), and the biases of these maps and of the norm; their sum is
the metric to rounding. The gain of the norm is folded, its bias kept as part `bias`. All supported families norm before
attention and MLP; one with norms behind them would need its parts scaled by those first.

v is pulled back to the columns of `o` and `down` (v W), so no head's output is ever formed in the width of the model.

What it cannot see: a head whose output is read by later blocks has no direct effect, and may decide everything (on four
trained two-layer models the decisive head lies in the first layer). It is arithmetic on one forward pass and no
intervention, hence `correlational`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..anatomy import family_of
from ..behaviors import Behavior, Pairs
from ..console import Advance, ignore
from ..hooks import weight_of
from ..stream import Stream
from ..units import Scores
from .results import to_scores
from .walk import Inputs, ascend, clean_inputs, read_sites


@dataclass(frozen=True, eq=False)
class Direct:
    """The parts of the logit difference of every pair, in logits, float64.

    `embedding` [n], `units` [units, n] in the order of `Anatomy.units` (a key-value group is the sum of its heads, so
    sums count heads and neurons), `bias` [n]; `total` [n] is the metric itself.
    """

    scores: Scores
    embedding: Tensor
    units: Tensor
    bias: Tensor
    total: Tensor

    def gap(self) -> float:
        """The largest difference between the metric and the sum of its parts, in logits."""
        counted = torch.tensor([unit.kind != "kv_group" for unit in self.scores.units])
        return float((self.embedding + self.units[counted].sum(0) + self.bias - self.total).abs().max())


@torch.no_grad()
def direct_effects(stream: Stream, behavior: Behavior, *, advance: Advance = ignore) -> Direct:
    """The direct contributions to logit[answer] - logit[wrong] of contrast pairs.

    The values of `scores` are minus the contributions: what would be missing without the unit at a frozen norm, in the
    sign of all other effects. ValueError for sentences.
    """
    pairs = behavior.pairs
    if not isinstance(pairs, Pairs):
        raise ValueError(f"{behavior.name}: direct attribution needs one answer position, sentences have many")
    store = stream.store("direct")
    try:
        ascend(stream, {"clean": clean_inputs(stream, behavior)}, store, advance=advance)
        sizes = [len(ids) for ids in stream.batches(pairs.clean)]
        positions, answers, wrongs = (field.split(sizes) for field in (pairs.position, pairs.answer, pairs.wrong))
        directions, biases, embeddings, totals = [], [], [], []
        for b, (position, answer, wrong) in enumerate(zip(positions, answers, wrongs, strict=True)):
            rows = torch.arange(len(position))
            final = store.get(("clean", stream.depth, b), stream.device)[rows, position]
            v, bias = _direction(stream, final, answer, wrong)
            directions.append(v)
            biases.append(bias)
            embeddings.append((store.get(("clean", 0, b), stream.device)[rows, position].double() * v).sum(-1))
            logits = stream.logits(final)
            totals.append((logits[rows, answer] - logits[rows, wrong]).double())
        units = []
        for i in range(stream.depth):
            with stream.block(i) as module:

                def inputs(run: str, b: int, i: int = i) -> Tensor:
                    return store.get((run, i, b), stream.device)

                pieces = [
                    _block(stream, i, module, inputs, b, position, directions[b])
                    for b, position in enumerate(positions)
                ]
            units.append(torch.cat([contribution for contribution, _ in pieces]))
            biases = [known + bias for known, (_, bias) in zip(biases, pieces, strict=True)]
        parts = torch.cat(units, dim=1).T
        scores = to_scores("direct-logit-attribution", "correlational", behavior, stream.anatomy.units(), -parts)
        return Direct(scores, torch.cat(embeddings), parts, torch.cat(biases), torch.cat(totals))
    finally:
        store.clear()


def _direction(stream: Stream, final: Tensor, answer: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
    """v float64 [n, hidden] and beta . u [n] for final residuals [n, hidden]."""
    family = family_of({"model_type": stream.anatomy.model_type})
    unembedding = stream.outer_weight(family.head)
    u = unembedding[answer].double() - unembedding[wrong].double()
    x = final.double()
    # Of zeros a norm leaves its bias; of ones RMSNorm leaves its gain as well, LayerNorm nothing.
    zeros, ones = (stream.normed(torch.full_like(final[:1], value)).double() for value in (0.0, 1.0))
    centred = torch.equal(zeros, ones)
    folded = u * stream.outer_weight(family.norm).double()
    if centred:
        folded = folded - folded.mean(-1, keepdim=True)
    beta = (zeros * u).sum(-1)
    # s from what the norm did with this residual, so that its epsilon need not be known.
    normed = (stream.normed(final).double() - zeros) / stream.outer_weight(family.norm).double()
    moved = x - x.mean(-1, keepdim=True) if centred else x
    s = (normed * moved).sum(-1, keepdim=True) / moved.square().sum(-1, keepdim=True)
    return folded * s, beta


def _block(
    stream: Stream, index: int, module: nn.Module, inputs: Inputs, b: int, position: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Contributions [n, units] of a block's units, and [n] of its two biases."""
    place, rows = stream.anatomy.blocks[index], torch.arange(len(position))
    z = read_sites(stream, module, place, inputs("clean", b))
    bias = torch.zeros(len(v), dtype=torch.float64, device=v.device)
    effects = {}
    for site, activation in z.items():
        matrix = place.role(site)
        effects[site] = activation[rows, position].double() * (v @ weight_of(module, place, matrix).double())
        offset = module.get_submodule(place.local(matrix)).bias
        if isinstance(offset, Tensor):
            bias += v @ offset.double()
    heads = effects["o"].unflatten(1, (place.heads, -1)).sum(-1)
    groups = heads.unflatten(1, (place.kv_heads, -1)).sum(-1)
    return torch.cat([heads, groups, effects["down"]], dim=1), bias
