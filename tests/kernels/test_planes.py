"""Codes in words: packing is exact, and the assembly, run by an emulator, gives the numbers that it promises."""

import re

import pytest
import torch
from torch import Tensor

from circuitpress_kernels import books, planes

BITS = sorted(planes.PLANES)


def emulate(code: str, registers: dict[str, int]) -> dict[str, int]:
    """Runs PTX of planes.py and books.py: moves, shifts, masks, permutations, lop3 with the table of (a & b) | c."""
    body = code.strip("{} ").partition(";")[2]
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
        elif name == "and.b32":
            result = numbers[0] & numbers[1]
        elif name == "prmt.b32":
            four = [numbers[2] >> 4 * place & 15 for place in range(4)]
            assert max(four) < 8  # else a sign would be spread
            result = sum(((numbers[0] | numbers[1] << 32) >> 8 * byte & 255) << 8 * at for at, byte in enumerate(four))
        else:
            assert (name, numbers[3]) == ("lop3.b32", 0xEA)
            result = numbers[0] & numbers[1] | numbers[2]
        known[goal] = result & 0xFFFFFFFF
    return known


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
            found = numbers(emulate(planes.assembly(bits, index, bfloat=bfloat), operands)["$0"], kind)
            if bits == 8 and bfloat:
                upper = numbers(emulate(planes.assembly(bits, index, bfloat=True, nibble=1), operands)["$0"], kind)
                found, unit = (found - bias) + 16 * (upper - bias) + bias, 1
            assert torch.equal(found, bias + code[index].double() * unit)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_assembly_looks_every_code_up(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    slices = books.book_slices(bits)
    codes = torch.randint(0, 2**bits, (40, slices, 2), dtype=torch.uint8, generator=generator)
    packed = planes.pack(codes, bits)[:, 0].int() & 0xFFFF
    words = (packed[:, :, 0] + (packed[:, :, 1].long() << 16)).tolist()
    book = torch.randint(0, 2**16, (2**bits,), generator=generator)
    halves = [half.view(-1, 4) << torch.arange(0, 32, 8) for half in (book & 255, book >> 8)]
    twice = [int(four.sum()) for half in halves for four in half for _ in range(2)]
    for stored, code in zip(words, codes, strict=True):
        registers = {f"${slices + place}": value for place, value in enumerate([*stored, *twice])}
        found = emulate(books.book_assembly(bits), registers)
        pairs = book[code.long()]
        assert [found[f"${index}"] for index in range(slices)] == (pairs[:, 0] | pairs[:, 1] << 16).tolist()
    inputs = planes.words(bits) + len(twice)
    assert books.book_constraints(bits) == ",".join(["=r"] * slices + ["r"] * inputs)
