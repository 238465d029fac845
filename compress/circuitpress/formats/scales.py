"""Scales in six bits: two of exponent and four of mantissa, below one shared exponent for every 16 rows.

    scale = 2^(top - e) * (1 + m / 16)          e in 0..3, m in 0..15, top one signed byte for every 16 rows

A float16 scale for every 64 weights is 0.25 bits a weight; this one is 0.094 (0.102 with the shared exponents of 64
columns) and is off by 3 % at most, which codes that are chosen after it make up for: weighted error rises by 1 % at 2
and 3 bits, by 3 % at 4 (matrices of stories260K and babyllama-105), where 0.15 bits are worth 19 %. Every such scale
is also a float16 number, so whatever computes with scales does not notice. llama.cpp's k-quants do the same in linear
steps. With `signed`, one mantissa bit gives way to a sign: a codebook can be mirrored.
"""

import torch
from torch import Tensor

BITS = 6
ROWS = 16
"""Rows that share an exponent. A stripe of 64 rows then begins at a whole byte of every stream."""
_LEVELS = 4
LOWEST, HIGHEST = -17, 15
"""Of the shared exponent: below, the smallest scale would not be a float16 number."""


def shared_exponents(sizes: Tensor) -> Tensor:
    """float32 [rows, 1]: the exponent under which the largest of the scales `sizes` [rows, groups] fits, of 16 rows."""
    rows = sizes.shape[0]
    padded = torch.nn.functional.pad(sizes.float().abs(), (0, 0, 0, -rows % ROWS))
    largest = padded.reshape(-1, ROWS * sizes.shape[1]).amax(1).clamp(min=2.0**LOWEST)
    top = (torch.frexp(largest).exponent - 1).clamp(LOWEST, HIGHEST).float()
    return top.repeat_interleave(ROWS)[:rows, None]


def round_scales(scales: Tensor, top: Tensor, *, signed: bool = False) -> Tensor:
    """The nearest scales that can be stored, float32; `top` (from `shared_exponents`) broadcasts to `scales`."""
    exponent, mantissa = _split(scales, top, steps=8 if signed else 16)
    size = torch.ldexp(1 + mantissa / (8 if signed else 16), exponent)
    return torch.where(scales < 0, -size, size) if signed else size


def pack_scales(scales: Tensor, *, signed: bool = False) -> tuple[Tensor, Tensor]:
    """Codes uint8 [rows, groups] below 64 and shared exponents int8 [ceil(rows / 16)] of scales that can be stored."""
    top = shared_exponents(scales)
    steps = 8 if signed else 16
    exponent, mantissa = _split(scales.float(), top, steps=steps)
    codes = (top - exponent) * steps + mantissa
    if signed:
        codes = codes + 32 * (scales < 0)
    return codes.to(torch.uint8), top[::ROWS, 0].to(torch.int8)


def unpack_scales(codes: Tensor, exponents: Tensor, *, signed: bool = False) -> Tensor:
    """float16 [rows, groups]: the inverse of `pack_scales`."""
    steps = 8 if signed else 16
    top = exponents.float().repeat_interleave(ROWS)[: codes.shape[0], None]
    value = codes.float()
    sign = torch.where(value >= 32, -1.0, 1.0) if signed else torch.ones_like(value)
    value = value % 32 if signed else value
    step = torch.div(value, steps, rounding_mode="floor")
    return (sign * torch.ldexp(1 + (value - steps * step) / steps, top - step)).half()


def _split(scales: Tensor, top: Tensor, *, steps: int) -> tuple[Tensor, Tensor]:
    """Exponents and mantissas (in units of 1 / steps) of the nearest scales, both whole numbers in float32."""
    smallest, largest = (
        torch.ldexp(torch.ones_like(top), top - (_LEVELS - 1)),
        torch.ldexp(2 - 1 / steps + 0 * top, top),
    )
    size = torch.minimum(torch.maximum(scales.abs(), smallest), largest)
    fraction, exponent = torch.frexp(size)
    mantissa = ((2 * fraction - 1) * steps).round_()
    carried = mantissa == steps
    return (exponent - 1 + carried).float(), torch.where(carried, 0.0, mantissa)
