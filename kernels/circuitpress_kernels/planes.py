"""How codes of 2 to 8 bits lie in 16-bit words, and how a kernel takes two of them out at once.

    word[kk], field j   =   code of column  j * S + kk  of a superblock of  (fields a word) * S  columns

1. Field j of all S words of a row is a run of S neighbouring columns, a *slice*. So the activations that a slice meets
   are contiguous, and a slice lies in one group of columns: its scale multiplies the finished dot product.
2. Tensor cores want two neighbours in one 32-bit register. Words kk and kk + 1 are that register, so one `lop3` with a
   mask for both halves takes two codes out and, in the same instruction, sets the exponent of a float16 (or bfloat16):

       (register & mask) | magic   =   two numbers  bias + code * 2^p

   with bias 1024 (128), as long as the code ends inside the mantissa of 10 (7) bits. The dot product is linear, so
   2^-p and the bias are taken off its float32 result. Other fields are shifted right first, by one amount for many.
3. 3, 5 and 6 bits are two planes, 2 + 1, 4 + 1 and 4 + 2 bits, whose fields a second `lop3` merges. A word of the upper
   plane goes with several words of the lower one; its fields lie such that one shift serves all lanes of the same p.
4. 8 bits do not fit bfloat16's mantissa: there a code is two nibbles, and the dot product is taken twice.

The trick of the magic exponent is that of FasterTransformer (Kim et al. 2022, arXiv 2211.10017); the words by slices,
which spare a permutation of the activations inside a register, are ours.
"""

import torch
from torch import Tensor

PLANES = {2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 8: (8, 0)}
"""Bits a code -> bits in the lower and in the upper plane."""
_HALF = 8
"""Bits after which fields of the lower plane repeat their place in the mantissa, with one shift for the rest."""


def fields(bits: int) -> int:
    """Slices of a superblock."""
    lower, upper = PLANES[bits]
    return 16 // (upper or lower)


def words(bits: int) -> int:
    """Words of a superblock for every row and kk, those of the lower plane first."""
    lower, upper = PLANES[bits]
    return lower // upper + 1 if upper else 1


def lanes(bits: int) -> int:
    """Slices whose codes begin in the same word of the lower plane."""
    return 16 // PLANES[bits][0]


def upper_place(bits: int, index: int) -> int:
    """The lowest bit, in the word of the upper plane, of the code of slice `index` of a superblock."""
    lower, upper = PLANES[bits]
    group, lane = divmod(index, _HALF // lower)
    high, low = divmod(group, lower // (upper or lower))
    return lower * lane + upper * low + _HALF * high


def place(bits: int, index: int, *, bfloat: bool) -> int:
    """p of step 2: the lowest bit of the code of slice `index` when it becomes a number; 0 for nibbles (step 4)."""
    low = PLANES[bits][0] * index % _HALF
    return low if low + bits <= (7 if bfloat else 10) else 0


def pack(codes: Tensor, bits: int) -> Tensor:
    """int16 [rows, superblocks, words, S] from codes uint8 [rows, slices, S]; slices fill superblocks."""
    lower, upper = PLANES[bits]
    rows, slices, size = codes.shape
    each = fields(bits)
    parts = codes.view(rows, slices // each, each, size).int()
    packed = parts.new_zeros(rows, slices // each, words(bits), size)
    for index in range(each):
        code = parts[:, :, index]
        word, lane = divmod(index, lanes(bits))
        packed[:, :, word] |= (code & (2**lower - 1)) << (lower * lane)
        if upper:
            packed[:, :, -1] |= (code >> lower) << upper_place(bits, index)
    return packed.to(torch.int16)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`."""
    lower, upper = PLANES[bits]
    rows, superblocks, _, size = packed.shape
    each = fields(bits)
    wide = packed.int()
    codes = torch.empty(rows, superblocks, each, size, dtype=torch.uint8, device=packed.device)
    for index in range(each):
        word, lane = divmod(index, lanes(bits))
        code = (wide[:, :, word] >> (lower * lane)) & (2**lower - 1)
        if upper:
            above = wide[:, :, -1] >> upper_place(bits, index)
            code |= (above & (2**upper - 1)) << lower
        codes[:, :, index] = code.to(torch.uint8)
    return codes.view(rows, superblocks * each, size)


def assembly(bits: int, index: int, *, bfloat: bool, nibble: int = 0) -> str:
    """PTX for step 2: the register of two words that holds slice `index`, $1, becomes two numbers $0.

    With two planes $2 is the register of the upper one. 8 bits in bfloat16 take nibble 0 or 1 of the code.
    """
    magic = "0x43004300" if bfloat else "0x64006400"
    lower, upper = PLANES[bits]
    low, mask = place(bits, index, bfloat=bfloat), 2**lower - 1
    shift = lower * (index % lanes(bits)) - low
    if bits == 8 and bfloat:
        shift, mask = shift + 4 * nibble, 0xF
    goal = "u" if upper else "$0"
    body = _shift("t", "$1", shift) + f"lop3.b32 {goal}, t, {_both(mask << low)}, {magic}, 0xea; "
    if upper:
        body += _shift("t", "$2", upper_place(bits, index) - (low + lower))
        body += f"lop3.b32 $0, t, {_both((2**upper - 1) << (low + lower))}, u, 0xea; "
    return "{ .reg .b32 t, u; " + body + "}"


def _shift(goal: str, source: str, amount: int) -> str:
    """PTX of a shift to the right, or to the left if `amount` is negative."""
    if amount == 0:
        return f"mov.b32 {goal}, {source}; "
    return f"{'shr.u32' if amount > 0 else 'shl.b32'} {goal}, {source}, {abs(amount)}; "


def _both(mask: int) -> str:
    """The mask for both halves of a register."""
    return f"0x{mask * 0x00010001:08x}"
