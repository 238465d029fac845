"""Names, sizes, round trips and the decoded values of every format, and of several formats in one module."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from circuitpress.formats import (
    AbsmaxCodes,
    AbsmaxFormat,
    BookCodes,
    CastFormat,
    CodebookFormat,
    Format,
    IntCodes,
    IntFormat,
    OutlierCodes,
    OutlierFormat,
    decode_segments,
    pack_segments,
    parse,
    resolve,
    segment_shape,
    split_segments,
)
from circuitpress.menu import FORMAT

NAMES = [f"int{bits}g{group}" for bits in range(2, 9) for group in (1, 7, 16, 64, 128)] + [
    "float32",
    "float16",
    "bfloat16",
]
INTS = [f"int{bits}g{group}s6" for bits in (2, 3, 8) for group in (7, 64)]
BOOKS = ["code2", "code3", "code4", "code2g7", "code3g64", "code3r4g16", "code4r1g64"]
OUTLIERS = ["int3g16+0.5%", "int2g64s6+0.25%", "int4g7+0.01%"]
SYMMETRIC = ["sym2g7", "sym3g16", "sym4g64", "sym5g128", "sym8c", "sym4c"]
NAMES += INTS + BOOKS + OUTLIERS + SYMMETRIC + ["nf4", "llmint8"]


Value = AbsmaxCodes | IntCodes | BookCodes | OutlierCodes | Tensor


def random_value(form: Format, rows: int, cols: int, seed: int = 0) -> Value:
    """Codes, scales and zeros, or numbers, that the format can hold."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(form, CastFormat):
        return torch.randn(rows, cols, generator=generator).to(form.dtype)
    if isinstance(form, OutlierFormat):
        base = random_value(form.base, rows, cols, seed)
        assert isinstance(base, IntCodes)
        positions = torch.randperm(rows * cols, generator=generator)[: form.count(rows, cols)].sort().values
        return OutlierCodes(base, positions, torch.randn(len(positions), generator=generator).half())
    if isinstance(form, AbsmaxFormat):
        codes = torch.randint(len(form.levels), (rows, cols), generator=generator, dtype=torch.uint8)
        return AbsmaxCodes(codes, torch.rand(rows, -(-cols // form.width(cols)), generator=generator))
    assert isinstance(form, IntFormat | CodebookFormat)
    codes = torch.randint(2**form.bits, (rows, cols), generator=generator, dtype=torch.uint8)
    scales = torch.rand(rows, form.groups(cols), generator=generator).add(0.01)
    if isinstance(form, CodebookFormat):
        books = torch.randn(form.books(rows), 2**form.bits, generator=generator).half()
        return BookCodes(codes, books, form.round_scales(scales * torch.where(scales < 0.5, -1, 1)))
    zeros = torch.randint(2**form.bits, scales.shape, generator=generator, dtype=torch.uint8)
    if form.symmetric:
        zeros.fill_(2 ** (form.bits - 1))
    return IntCodes(codes, form.round_scales(scales), zeros)


def slow_decode(form: Format, value: Value) -> Tensor:
    """w = (code - zero) * scale or book[code] * scale, weight by weight."""
    if isinstance(value, Tensor):
        return value.float()
    if isinstance(value, OutlierCodes):
        assert isinstance(form, OutlierFormat)
        result = slow_decode(form.base, value.base)
        for position, number in zip(value.positions.tolist(), value.values.tolist(), strict=True):
            result[position // result.shape[1], position % result.shape[1]] = number
        return result
    assert isinstance(form, IntFormat | CodebookFormat | AbsmaxFormat)
    rows, cols = value.codes.shape
    result = torch.zeros(rows, cols)
    for r in range(rows):
        for c in range(cols):
            code = int(value.codes[r, c])
            if isinstance(form, AbsmaxFormat):
                assert isinstance(value, AbsmaxCodes)
                size = value.absmax[r, c // (form.block or cols)]
                result[r, c] = (code - 127) * size * (1 / 127) if form.bits == 8 else form.levels[code] * size
                continue
            g = c // (form.group_size or cols)
            if isinstance(value, IntCodes):
                entry = code - int(value.zeros[r, g])
            else:
                assert isinstance(form, CodebookFormat)
                assert isinstance(value, BookCodes)
                entry = float(value.books[r // form.share if form.share else 0, code])
            assert isinstance(value, IntCodes | BookCodes)
            result[r, c] = entry * float(value.scales[r, g])
    return result


def same(a: object, b: object) -> bool:
    """Whether two values hold the same tensors."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    assert isinstance(a, tuple) and isinstance(b, tuple)
    return all(same(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_names_read_back(name: str) -> None:
    assert parse(name).name == name
    assert resolve(name, group_size=99, dtype=torch.float16) == name
    assert FORMAT.fullmatch(name), "a recipe would refuse it"


@pytest.mark.parametrize(
    "name",
    ["int4", "dense", "int1g64", "int9g64", "int4g", "int4g64 ", "INT4g64", "float64", "fp16", "", "drop", "int4g64x"]
    + [
        "int4g64s8",
        "code5",
        "code1",
        "code3r16",
        "code3g0",
        "int4g64+0.6%",
        "int4g64+0.50%",
        "int4g64+0%",
        "code3+0.5%",
        "sym4",
        "sym1g64",
        "sym4g64s6",
        "sym4g64c",
        "nf4g64",
        "int8c",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not a format: there are int2 to int8"):
        parse(name)


@pytest.mark.parametrize("name", ["int4g0", "int4g064"])
def test_a_group_of_nothing_and_a_second_spelling_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not a format"):
        parse(name)


def test_short_names_are_completed() -> None:
    assert resolve("int4", group_size=32, dtype=torch.float32) == "int4g32"
    assert resolve("int8", group_size=128, dtype=torch.float32) == "int8g128"
    assert resolve("dense", group_size=32, dtype=torch.bfloat16) == "bfloat16"
    assert resolve("int4g16", group_size=32, dtype=torch.bfloat16) == "int4g16"
    for name in ("int4s6", "int3+0.5%", "int3s6+0.1%", "code3r16g64"):
        assert FORMAT.fullmatch(name)
    assert resolve("sym4", group_size=32, dtype=torch.float32) == "sym4g32"
    assert resolve("sym8c", group_size=32, dtype=torch.float32) == "sym8c"
    assert resolve("int4s6", group_size=32, dtype=torch.float32) == "int4g32s6"
    assert resolve("int3+0.5%", group_size=32, dtype=torch.float32) == "int3g32+0.5%"
    assert resolve("int3s6+0.1%", group_size=32, dtype=torch.float32) == "int3g32s6+0.1%"
    assert resolve("code3r16g64", group_size=32, dtype=torch.float32) == "code3r16g64"
    for name in ("int1", "int9", "half", "Dense"):
        with pytest.raises(ValueError, match="is not a format"):
            resolve(name, group_size=32, dtype=torch.float32)


@settings(deadline=None, max_examples=150)
@given(name=st.sampled_from(NAMES), rows=st.integers(1, 7), cols=st.integers(1, 70), seed=st.integers(0, 1000))
def test_pack_and_unpack(name: str, rows: int, cols: int, seed: int) -> None:
    form = parse(name)
    value = random_value(form, rows, cols, seed)
    packed = form.pack(value)
    layout = form.layout(rows, cols)
    assert {key: (t.dtype, t.numel()) for key, t in packed.items()} == layout
    assert all(t.dim() == 1 and t.is_contiguous() for t in packed.values())
    assert form.nbytes(rows, cols) == sum(t.numel() * t.element_size() for t in packed.values())
    back = form.unpack(packed, rows, cols)
    assert same(back, value)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("int", "code"))])
def test_codes_decode_to_the_formula(name: str) -> None:
    form = parse(name)
    value = random_value(form, 6, 37)
    decoded = form.decode(value)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, slow_decode(form, value))


@pytest.mark.parametrize(("name", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_casts_decode_to_what_is_stored(name: str, dtype: torch.dtype) -> None:
    value = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(parse(name).decode(value), value.to(dtype).float())
    assert torch.equal(parse(name).pack(value)["dense"], value.to(dtype).reshape(-1))


def test_known_sizes() -> None:
    # 5 x 172 in groups of 64: 3 groups a row; 860 codes of 3 bits are 322.5 bytes, 15 scales 30, 15 zeros 5.6.
    assert parse("int3g64").nbytes(5, 172) == 323 + 30 + 6
    assert parse("int8g128").nbytes(5, 172) == 860 + 20 + 10
    assert parse("bfloat16").nbytes(5, 172) == 1720
    assert parse("float32").nbytes(5, 172) == 3440
    # 15 scales of 6 bits are 11.25 bytes and share one exponent.
    assert parse("int3g64s6").nbytes(5, 172) == 323 + 12 + 1 + 6
    # 0.5 % of 860 weights are 4.3: five of 4 bytes.
    assert parse("int3g64+0.5%").nbytes(5, 172) == parse("int3g64").nbytes(5, 172) + 5 * 4
    assert parse("code3").nbytes(5, 172) == 323 + 5 * 8 * 2
    assert parse("code3g64").nbytes(20, 172) == 1290 + 8 * 2 + 45 + 2
    assert parse("code3r16g64").nbytes(20, 172) == 1290 + 2 * 8 * 2 + 45 + 2


def test_outliers_reach_as_far_as_sixteen_bits() -> None:
    form = parse("int2g64+0.01%")
    assert isinstance(form, OutlierFormat)
    rows, cols = 700, 300
    assert form.count(rows, cols) == 21
    assert form.count(1000, 300) == 30  # not 31 for the last bit of a product
    assert form.count(2, 3) == 1
    base = random_value(form.base, rows, cols)
    assert isinstance(base, IntCodes)
    values = torch.ones(21, dtype=torch.float16)
    near = torch.arange(21) * 9000
    far = torch.cat([torch.tensor([65535, 131071]), 131072 + torch.arange(19)])
    for positions in (near, far):
        value = OutlierCodes(base, positions, values)
        assert same(form.unpack(form.pack(value), rows, cols), value)
    with pytest.raises(ValueError, match="up to 65536 weights apart: 16 bits reach 65536"):
        form.pack(OutlierCodes(base, far + 1, values))


FLOATS = ("bfloat16", "float16", "float32")


@settings(deadline=None, max_examples=80)
@given(data=st.data(), axis=st.sampled_from(["rows", "cols"]), seed=st.integers(0, 1000))
def test_segments_lie_end_to_end(data: st.DataObject, axis: str, seed: int) -> None:
    """Any number of segments of any formats (one floating type, since they share a tensor) come back and decode."""
    floating = data.draw(st.sampled_from(FLOATS))
    names = [name for name in NAMES if name not in FLOATS or name == floating]
    widths = data.draw(st.lists(st.integers(1, 19), min_size=1, max_size=6))
    other = data.draw(st.integers(1, 21))
    shape = (sum(widths), other) if axis == "rows" else (other, sum(widths))
    at, parts, pieces, entries = 0, [], [], []
    for k, width in enumerate(widths):
        form = parse(data.draw(st.sampled_from(names)))
        rows, cols = (width, other) if axis == "rows" else (other, width)
        assert segment_shape(shape, axis, at, at + width) == (rows, cols)
        value = random_value(form, rows, cols, seed + k)
        parts.append((form, at, at + width, value))
        pieces.append(slow_decode(form, value))
        entries.append({"format": form.name, "start": at, "stop": at + width})
        at += width
    flat = pack_segments([(form, value) for form, _, _, value in parts])
    assert sum(t.numel() * t.element_size() for t in flat.values()) == sum(
        form.nbytes(*segment_shape(shape, axis, start, stop)) for form, start, stop, _ in parts
    )
    back = split_segments(flat, shape, [(form, start, stop) for form, start, stop, _ in parts], axis)
    assert all(same(value, again) for (_, _, _, value), again in zip(parts, back, strict=True))
    whole = torch.cat(pieces, 0 if axis == "rows" else 1)
    assert torch.equal(decode_segments(flat, list(shape), axis, entries), whole)
