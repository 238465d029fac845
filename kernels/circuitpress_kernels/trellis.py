"""What the bits of a trellis-coded sequence mean: the specification that encoders and kernels follow.

    state_t = L bits of the ring from bit B t on        value(state) = (sum of the four bytes of a * state + b) - 510

1. A sequence is a ring of codes of B bits, stored little-endian and without gaps: bit i of the ring is bit i mod 8 of
   byte i / 8. State t is a window of L bits, so any weight decodes by itself: two words, one funnel shift, one mask;
   the last states read on at the beginning of the ring. Weight t + 1 shares all but B of the bits.
2. A state stands for one value (V = 1), or for two (V = 2) where a weight costs a half-integer number of bits. The
   value is computed, no table is read: a multiply-add modulo 2^32 mixes the state, and the sum of four bytes is close
   to Gaussian, of variance 147.8^2 (the `1MAD` code of QTIP, arXiv 2406.11235, with constants of our own).
3. Values are whole numbers between -510 and 510, exact in float16; a weight is value * scale.

Squared error on Gaussian weights, relative to their variance, at L = 12: 0.0727 at 2 bits, 0.0193 at 3, 0.0054 at 4,
0.039 at 2.5. A table of permuted Gaussian quantiles has 0.0737, 0.0197, 0.0054 and 0.0396, the theoretical limit is
0.0625, 0.0156, 0.0039 and 0.0313, and a uniform grid has 0.119, 0.037 and 0.0115.
"""

import torch
from torch import Tensor

MIX = ((0x5E8766ED, 0x9C1CAAF7), (0x73CF256D, 0xDDA1494C))
"""Factor and summand of each of the values of a state: the best of 25 and of 12 random pairs at L = 12."""
SPREAD = 147.8
"""The standard deviation of a value: that of the sum of four random bytes."""


def trellis_table(memory: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """The values of all states, whole numbers in float32 [2^memory, width]; `width` is 1 or 2."""
    state = torch.arange(2**memory, device=device)
    columns = []
    for factor, summand in MIX[:width]:
        mixed = (state * factor + summand) & 0xFFFFFFFF
        columns.append((mixed & 255) + (mixed >> 8 & 255) + (mixed >> 16 & 255) + (mixed >> 24) - 510)
    return torch.stack(columns, 1).float()


def trellis_states(codes: Tensor, *, code_bits: int, memory: int) -> Tensor:
    """The states int64 [n, steps] of rings of codes uint8 [n, steps] with steps * code_bits >= memory."""
    wide = codes.long()
    reach = -(-memory // code_bits)
    ring = torch.cat([wide, wide[:, : reach - 1]], 1)
    states = torch.zeros_like(wide)
    for ahead in range(reach):
        states |= ring[:, ahead : ahead + wide.shape[1]] << (code_bits * ahead)
    return states & (2**memory - 1)


def trellis_values(codes: Tensor, *, code_bits: int, memory: int, width: int) -> Tensor:
    """The values of rings of codes uint8 [n, steps], whole numbers in float32 [n, steps * width]."""
    states = trellis_states(codes, code_bits=code_bits, memory=memory)
    return trellis_table(memory, width, device=codes.device)[states].flatten(1)
