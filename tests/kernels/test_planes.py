"""Codes in words: packing is exact, and the assembly, run by an emulator, gives the numbers that it promises."""

import re

import pytest
import torch
from torch import Tensor

from circuitpress_kernels import planes

BITS = sorted(planes.PLANES)


def emulate(code: str, registers: dict[str, int]) -> int:
    """Runs the PTX of `assembly`: moves, shifts, and lop3 with the table of (a & b) | c."""
    body = code.strip("{} ").removeprefix(".reg .b32 t, u; ")
    known = dict(registers)

    def value(text: str) -> int:
        return known[text] if text in known else int(text, 0)

    for line in filter(None, (part.strip() for part in body.split(";"))):
        name, goal, *operands = re.split(r"[ ,]+", line)
        numbers = [value(operand) for operand in operands]
        if name == "mov.b32":
            result = numbers[0]
        elif name == "shr.u32":
            result = numbers[0] >> numbers[1]
        elif name == "shl.b32":
            result = numbers[0] << numbers[1]
        else:
            assert (name, numbers[3]) == ("lop3.b32", 0xEA)
            result = numbers[0] & numbers[1] | numbers[2]
        known[goal] = result & 0xFFFFFFFF
    return known["$0"]


def numbers(register: int, kind: torch.dtype) -> Tensor:
    """The two 16-bit numbers of a register, the lower half first."""
    return torch.tensor([register & 0xFFFF, register >> 16], dtype=torch.int32).to(torch.int16).view(kind).double()


@pytest.mark.parametrize("bits", BITS)
def test_unpack_is_the_inverse_of_pack_and_no_bit_is_wasted(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (3, 2 * planes.fields(bits), 16), dtype=torch.uint8, generator=generator)
    packed = planes.pack(codes, bits)
    assert packed.shape == (3, 2, planes.words(bits), 16)
    assert 16 * packed.numel() == bits * codes.numel()
    assert torch.equal(planes.unpack(packed, bits), codes)


@pytest.mark.parametrize("bfloat", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_assembly_makes_bias_plus_code_times_a_power_of_two(bits: int, bfloat: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (40, planes.fields(bits), 2), dtype=torch.uint8, generator=generator)
    packed = planes.pack(codes, bits)[:, 0].int() & 0xFFFF
    registers = (packed[:, :, 0] + (packed[:, :, 1].long() << 16)).tolist()
    kind, bias = (torch.bfloat16, 128) if bfloat else (torch.float16, 1024)
    for words, code in zip(registers, codes, strict=True):
        for index in range(planes.fields(bits)):
            operands = {"$1": words[index // planes.lanes(bits)], "$2": words[-1]}
            unit = 2 ** planes.place(bits, index, bfloat=bfloat)
            found = numbers(emulate(planes.assembly(bits, index, bfloat=bfloat), operands), kind)
            if bits == 8 and bfloat:
                upper = numbers(emulate(planes.assembly(bits, index, bfloat=True, nibble=1), operands), kind)
                found, unit = (found - bias) + 16 * (upper - bias) + bias, 1
            assert torch.equal(found, bias + code[index].double() * unit)
