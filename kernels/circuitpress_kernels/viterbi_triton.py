"""The two passes of the trellis encoder on a GPU: forward over all states, then back along the least path.

    cost[s] = m_t[s mod P] + sum_k features[s, k] * terms[t, k]
    m_(t+1)[b] = min over the R states s with s // R = b

with R = 2^code_bits branches and P = 2^L / R buckets. Names and numbers are those of `circuitpress.quantize.viterbi`,
which explains the algorithm and specifies the result; only the order of sums differs.

1. Forward: one program a sequence. The least costs of a step, P numbers, are written to global memory, where the
   trace-back needs them anyway, and read back by the same program for the next step: they are still in the cache.
   States are numbered such that both the reads and the minima run over neighbours. Nothing else is kept: neither the
   2^L costs nor back pointers.
2. Back: one program for several sequences, one step after the other. It recomputes the R costs that lead to the state
   it is in: the arithmetic is nothing beside waiting for the reads, and sequences wait together.

The published encoders (QTIP, exllamav3) store back pointers, or half-precision costs, and are CUDA only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Fused multiply-adds are Triton's default until 3.10; unsaid, 3.9 warns.
OPTIONS = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}
BACK_OPTIONS = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}
STATES = 4096
"""States of one inner step of a program, 16 for each of its threads."""
SEQUENCES = 4
"""Sequences of one program on the way back."""


@triton.jit
def viterbi_forward(
    terms,
    features,
    kept,
    steps,
    count,
    TERMS: tl.constexpr,
    BRANCHES: tl.constexpr,
    BUCKETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fills kept[n, 1:] from kept[n, 0]. Grid (count,).

    `terms` float32 [steps, TERMS, count], `features` float32 [BRANCHES * BUCKETS, TERMS], `kept` float32
    [count, steps + 1, BUCKETS]; BLOCK buckets at a time.
    """
    sequence = tl.program_id(0)
    own = kept + sequence.to(tl.int64) * (steps + 1) * BUCKETS
    branch = tl.arange(0, BRANCHES)
    for step in range(steps):
        term = terms + step * TERMS * count + sequence
        for first in range(0, BUCKETS, BLOCK):
            bucket = first + tl.arange(0, BLOCK)
            state = bucket[:, None] * BRANCHES + branch[None, :]
            cost = tl.load(own + step * BUCKETS + (state & (BUCKETS - 1)))
            for k in tl.static_range(TERMS):
                cost += tl.load(features + state * TERMS + k) * tl.load(term + k * count)
            tl.store(own + (step + 1) * BUCKETS + bucket, tl.min(cost, axis=1))
        # What this step wrote other threads of the program read in the next.
        tl.debug_barrier()


@triton.jit
def viterbi_back(
    terms,
    features,
    kept,
    ends,
    codes,
    steps,
    count,
    last,
    TERMS: tl.constexpr,
    BRANCHES: tl.constexpr,
    BUCKETS: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    """codes[t - last, n] of the least paths that end on `ends`, for t from steps - 1 down to `last`.

    Grid (ceil(count / SEQUENCES),). `ends` int32 [count] is replaced by the bits that the paths begin on; `codes` uint8
    [steps - last, count]; the others as in `viterbi_forward`.
    """
    sequence = tl.program_id(0) * SEQUENCES + tl.arange(0, SEQUENCES)
    there = sequence < count
    own = kept + sequence.to(tl.int64) * (steps + 1) * BUCKETS
    branch = tl.arange(0, BRANCHES)
    end = tl.load(ends + sequence, mask=there, other=0)
    for back in range(steps - last):
        step = steps - 1 - back
        state = end[:, None] * BRANCHES + branch[None, :]
        mask = there[:, None] & (branch[None, :] >= 0)
        cost = tl.load(own[:, None] + step * BUCKETS + (state & (BUCKETS - 1)), mask=mask, other=0.0)
        term = terms + step * TERMS * count + sequence
        for k in tl.static_range(TERMS):
            factor = tl.load(term + k * count, mask=there, other=0.0)
            cost += tl.load(features + state * TERMS + k) * factor[:, None]
        best = tl.argmin(cost, axis=1)
        tl.store(codes + (step - last) * count + sequence, best.to(tl.uint8), mask=there)
        end = (end * BRANCHES + best) & (BUCKETS - 1)
    tl.store(ends + sequence, end, mask=there)


def viterbi_search(
    terms: Tensor, features: Tensor, held: Tensor | None, *, code_bits: int, last: int = 0
) -> tuple[Tensor, Tensor]:
    """The least paths: codes uint8 [steps - last, n] from step `last` on, and the bits int64 [n] they begin on there.

    `terms` is float32 [steps, 2V, n], `features` float32 [2^L, 2V]; with `held` int64 [n] a path begins and ends on
    those bits, without it is free at both ends.
    """
    steps, width, count = terms.shape
    branches = 2**code_bits
    buckets = len(features) // branches
    terms, features = terms.contiguous(), features.contiguous()
    kept = terms.new_empty(count, steps + 1, buckets)
    if held is None:
        kept[:, 0] = 0
    else:
        kept[:, 0] = torch.inf
        kept[:, 0].scatter_(1, held[:, None], 0)
    constants = {"TERMS": width, "BRANCHES": branches, "BUCKETS": buckets}
    block = min(buckets, max(1, STATES // branches))
    viterbi_forward[(count,)](terms, features, kept, steps, count, **constants, BLOCK=block, **OPTIONS)
    ends = (kept[:, -1].argmin(1) if held is None else held).to(torch.int32)
    codes = torch.empty(steps - last, count, dtype=torch.uint8, device=terms.device)
    grid = (triton.cdiv(count, SEQUENCES),)
    viterbi_back[grid](
        terms, features, kept, ends, codes, steps, count, last, **constants, SEQUENCES=SEQUENCES, **BACK_OPTIONS
    )
    return codes, ends.long()
