"""Names, sizes, round trips and the decoded values of every format, and of several formats in one module."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from circuitpress.formats import (
    CastFormat,
    Format,
    IntCodes,
    IntFormat,
    decode_segments,
    pack_segments,
    parse,
    resolve,
    segment_shape,
    split_segments,
)

NAMES = [f"int{bits}g{group}" for bits in range(2, 9) for group in (1, 7, 16, 64, 128)] + [
    "float32",
    "float16",
    "bfloat16",
]


def random_value(form: Format, rows: int, cols: int, seed: int = 0) -> IntCodes | Tensor:
    """Codes, scales and zeros, or numbers, that the format can hold."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(form, CastFormat):
        return torch.randn(rows, cols, generator=generator).to(form.dtype)
    assert isinstance(form, IntFormat)
    groups = -(-cols // form.group_size)
    codes, zeros = (
        torch.randint(2**form.bits, (rows, n), generator=generator, dtype=torch.uint8) for n in (cols, groups)
    )
    return IntCodes(codes, torch.rand(rows, groups, generator=generator).add(0.01).half(), zeros)


def slow_decode(value: IntCodes, group_size: int) -> Tensor:
    """w = (code - zero) * scale, weight by weight."""
    rows, cols = value.codes.shape
    result = torch.zeros(rows, cols)
    for r in range(rows):
        for c in range(cols):
            g = c // group_size
            result[r, c] = (int(value.codes[r, c]) - int(value.zeros[r, g])) * float(value.scales[r, g])
    return result


@pytest.mark.parametrize("name", NAMES)
def test_names_read_back(name: str) -> None:
    assert parse(name).name == name
    assert resolve(name, group_size=99, dtype=torch.float16) == name


@pytest.mark.parametrize(
    "name",
    ["int4", "dense", "int1g64", "int9g64", "int4g", "int4g64 ", "INT4g64", "float64", "fp16", "", "drop", "int4g64x"],
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
    if isinstance(value, IntCodes):
        assert all(torch.equal(a, b) for a, b in zip(back, value, strict=True))
    else:
        assert torch.equal(back, value)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("int")])
def test_integers_decode_to_the_formula(name: str) -> None:
    form = parse(name)
    value = random_value(form, 3, 37)
    assert isinstance(value, IntCodes)
    decoded = form.decode(value)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, slow_decode(value, form.group_size))  # pyright: ignore[reportAttributeAccessIssue]


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
        pieces.append(slow_decode(value, form.group_size) if isinstance(value, IntCodes) else value.float())  # pyright: ignore
        entries.append({"format": form.name, "start": at, "stop": at + width})
        at += width
    flat = pack_segments([(form, value) for form, _, _, value in parts])
    assert sum(t.numel() * t.element_size() for t in flat.values()) == sum(
        form.nbytes(*segment_shape(shape, axis, start, stop)) for form, start, stop, _ in parts
    )
    back = split_segments(flat, shape, [(form, start, stop) for form, start, stop, _ in parts], axis)
    for (_, _, _, value), again in zip(parts, back, strict=True):
        pairs = zip(value, again, strict=True) if isinstance(value, IntCodes) else [(value, again)]
        assert all(torch.equal(a, b) for a, b in pairs)
    whole = torch.cat(pieces, 0 if axis == "rows" else 1)
    assert torch.equal(decode_segments(flat, list(shape), axis, entries), whole)
