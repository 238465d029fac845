"""The tail-biting trellis encoder: the bits of a sequence of weights that decode to the nearest values.

A sequence of T weights is a ring of T/V codes c_t of B bits, B / V bits a weight. Weight t reads the L bits of the ring
that begin at its own code: the state s_t = c_t + 2^B c_(t+1) + ..., of which L - B bits are also in s_(t+1). A table of
2^L rows turns the state into V values (Marcellin and Fischer 1990; QTIP, Tseng et al. 2024, arXiv 2406.11235). So a
weight costs B / V bits, but is drawn from 2^L values, and its neighbours cannot be chosen freely. The best choice for
all weights together is the cheapest path:

1. Let m_t[b] be the least cost of all codes before t whose last state ended on the L - B bits b. One step is

       cost[s] = m_t[s mod 2^(L-B)] + |x_t - table[s]|^2,        m_(t+1)[b] = min over the 2^B s with s >> B = b

   States are numbered such that the first line adds a contiguous block and the second takes minima over neighbours: no
   permutation anywhere. Only m is kept, 2^(L-B) numbers a step.
2. Trace-back visits one state a step, so it recomputes which of the 2^B candidates was the least, for that state only:
   no back pointers are stored and the inner loop needs no argmin.
3. The ring must close: the bits that the last state ends on are those the first begins with. Trying all 2^(L-B) would
   be exact; instead a pass over the `CONTEXT` weights on either side of the seam, free at both ends, finds the bits at
   the seam, and a second pass over the ring is held to them at both ends.

The step's three operations on [2^L, n] (an outer product by matrix multiplication, a sum, a minimum) run at the speed
of the cache when n sequences fill it and no more. No library encodes on a CPU: the published encoders are CUDA only.
On a GPU the two passes are Triton kernels (`circuitpress_kernels.viterbi_triton`).
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

CONTEXT = 48
"""Steps on either side of the seam that choose the bits there: 0.3 % more error than with half a ring of 256."""
_LEAST = 16
"""The same where a ring has less than twice that: the ring is then walked more than once."""
_CACHE = 1 << 18
"""Costs [2^L, n] in use at once: 1 MiB, a common second-level cache. 0.5 ns a state, one thread."""
_LANES = 16
"""Sequences in use at once are a multiple of this: with 8 a state takes 1.4 ns."""
_BLOCKS = 32
"""With fewer sequences `amin`, which walks along them, takes up to 5 times as long as halving with `minimum`."""
_KEPT = 1 << 25
"""Numbers m that are kept for the trace-back at once: 128 MiB."""
_KEPT_ON_GPU = 1 << 29
"""The same on a GPU: 2 GiB, a thousand sequences of 128 weights with L = 14."""


def encode(values: Tensor, table: Tensor, *, code_bits: int, weights: Tensor | None = None) -> Tensor:
    """Codes uint8 [n, steps] of the sequences `values` [n, T], with steps = T / V.

    `table` is float32 [2^L, V], `weights` [n, T] (or what broadcasts to it) weighs the squared errors; a weight of zero
    makes a value of no matter, which is how a sequence is filled up. ValueError if V does not divide T or the ring is
    shorter than a state (steps * code_bits < L).
    """
    count, length = values.shape
    states, width = table.shape
    steps = length // width
    if length % width or steps * code_bits < states.bit_length() - 1:
        message = f"a sequence of {length} values has no ring of {code_bits}-bit codes for {width} values"
        raise ValueError(f"{message} and states of {states.bit_length() - 1} bits: fill it up with weights of zero")
    weights = torch.ones_like(values) if weights is None else weights.expand_as(values)
    # |x - v|^2 = v^2 - 2 x v + what does not depend on the state: [steps, 2V, count] against [2^L, 2V].
    terms = torch.cat([weights.view(count, steps, width), (-2 * weights * values).view(count, steps, width)], 2)
    codes = torch.empty(count, steps, dtype=torch.uint8, device=values.device)
    features = torch.cat([table.square(), table], 1)
    search = _search(features, code_bits)
    kept = (_KEPT_ON_GPU if values.is_cuda else _KEPT) // (steps * states >> code_bits)
    for part, out in zip(terms.split(max(_LANES, kept)), codes.split(max(_LANES, kept)), strict=True):
        out.copy_(_ring(part.permute(1, 2, 0), search).T)
    return codes


Search = Callable[[Tensor, Tensor | None, int], tuple[Tensor, Tensor]]
"""(terms [steps, 2V, n], bits held at both ends int64 [n] or None, step `last`) -> codes uint8 [steps - last, n] of the
least paths from step `last` on, and the bits int64 [n] that they begin on there."""


def _search(features: Tensor, code_bits: int) -> Search:
    """Triton on a GPU, torch elsewhere."""
    if not features.is_cuda or find_spec("triton") is None:
        return _Trellis(features, code_bits).search
    from circuitpress_kernels.viterbi_triton import viterbi_search

    return lambda terms, held, last: viterbi_search(terms, features, held, code_bits=code_bits, last=last)


def _ring(terms: Tensor, search: Search) -> Tensor:
    """Codes uint8 [steps, n] of closed rings from `terms` [steps, 2V, n]."""
    steps = len(terms)
    lead = min(CONTEXT, max(_LEAST, steps // 2))
    around = terms[torch.arange(-lead, lead, device=terms.device) % steps]
    _, bits = search(around, None, lead)
    return search(terms, bits, 0)[0]


class _Trellis:
    """The search in torch, for the cache of one core."""

    def __init__(self, features: Tensor, code_bits: int) -> None:
        self.features = features
        self.branches = 2**code_bits
        self.buckets = len(features) // self.branches
        self.room = features.new_empty(0)

    def search(self, terms: Tensor, held: Tensor | None, last: int) -> tuple[Tensor, Tensor]:
        """A `Search`."""
        count = terms.shape[2]
        batches = -(-count * len(self.features) // _CACHE)
        lanes = -(-count // (batches * _LANES)) * _LANES
        terms = torch.nn.functional.pad(terms, (0, -count % lanes))
        start = terms.new_zeros(self.buckets, terms.shape[2])
        if held is not None:
            held = torch.nn.functional.pad(held, (0, -count % lanes))
            start.fill_(torch.inf).scatter_(0, held[None], 0)
        kept = self.forward(terms, start, lanes)
        ends = kept[:, -1].argmin(1).reshape(-1) if held is None else held
        codes, bits = self.backward(terms, kept, ends, last)
        return codes[:, :count], bits[:count]

    def forward(self, terms: Tensor, start: Tensor, lanes: int) -> Tensor:
        """The least costs m [n / lanes, steps + 1, buckets, lanes], from `start` [buckets, n] on."""
        steps, _, count = terms.shape
        size = count * (steps + 1) * self.buckets
        if size > len(self.room):  # Used again and again: pages that are fresh every time cost as much as the minimum.
            self.room = terms.new_empty(size)
        kept = self.room[:size].view(count // lanes, steps + 1, self.buckets, lanes)
        cost = terms.new_empty(self.branches * self.buckets, lanes)
        by_bucket = cost.view(self.branches, self.buckets, lanes)
        by_branch = cost.view(self.buckets, self.branches, lanes)
        for batch, m in enumerate(kept.unbind()):
            span = slice(batch * lanes, (batch + 1) * lanes)
            m[0] = start[:, span]
            own = terms[:, :, span].contiguous()
            for before, after, term in zip(m[:-1].unbind(), m[1:].unbind(), own.unbind(), strict=True):
                torch.mm(self.features, term, out=cost)
                by_bucket.add_(before)
                if lanes >= _BLOCKS:
                    torch.amin(by_branch, 1, out=after)
                else:
                    _least(by_branch, after)
        return kept

    def backward(self, terms: Tensor, kept: Tensor, ends: Tensor, last: int) -> tuple[Tensor, Tensor]:
        """Codes uint8 [steps - last, n] of the paths that end on the bits `ends` [n], and the bits they begin on."""
        batches, places, _, lanes = kept.shape
        lane = torch.arange(batches * lanes, device=ends.device)
        base = (lane // lanes) * places * self.buckets * lanes + lane % lanes
        flat = kept.view(-1)
        branch = torch.arange(self.branches, device=ends.device)[:, None]
        codes = []
        for t in range(places - 2, last - 1, -1):
            state = ends * self.branches + branch
            cost = flat[base + (t * self.buckets + state % self.buckets) * lanes]
            cost += torch.linalg.vecdot(self.features[state], terms[t].T)
            best = cost.argmin(0)
            codes.append(best.to(torch.uint8))
            ends = (ends * self.branches + best) % self.buckets
        return torch.stack(codes[::-1]), ends


def _least(values: Tensor, out: Tensor) -> None:
    """`amin` along the second axis, a power of two, which is overwritten on the way."""
    half = values.shape[1] // 2
    while half > 1:
        torch.minimum(values[:, :half], values[:, half : 2 * half], out=values[:, :half])
        half //= 2
    torch.minimum(values[:, 0], values[:, 1], out=out)
