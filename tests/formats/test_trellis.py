"""Trellis formats: names, sizes, bit streams read bit by bit, decoded values, and the same through packed segments."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from circuitpress.formats import TrellisCodes, TrellisFormat, decode_segments, pack_segments, parse, resolve
from circuitpress.formats.rotation import rotate
from circuitpress.formats.trellis import rotate_inputs, row_codes, row_scales, strip_codes, strip_scales, strips

NAMES = ("trellis1.5", "trellis2", "trellis2.5", "trellis3", "trellis3.5", "trellis4", "trellis2l10", "trellis2.5l12")
SHAPES = ((64, 64), (172, 64), (48, 172), (1, 1), (3, 7), (509, 5), (130, 33))


def make(name: str) -> TrellisFormat:
    form = parse(name)
    assert isinstance(form, TrellisFormat)
    return form


def random_codes(form: TrellisFormat, rows: int, cols: int, seed: int = 0) -> TrellisCodes:
    generator = torch.Generator().manual_seed(seed)
    count = sum(r.count * r.steps for a, b in strips(cols) for r in [form.rings(rows * (b - a))])
    codes = torch.randint(2**form.code_bits, (count,), generator=generator, dtype=torch.uint8)
    by_row, by_strip = (torch.randint(256, (n,), generator=generator, dtype=torch.uint8) for n in (rows, -(-cols // 4)))
    return TrellisCodes(codes, torch.tensor([0.37, 0.03], dtype=torch.float16), by_row, by_strip, (rows, cols))


def slow_value(state: int, place: int) -> int:
    """The sum of the four bytes of factor * state + summand, centred."""
    factor, summand = ((0x5E8766ED, 0x9C1CAAF7), (0x73CF256D, 0xDDA1494C))[place]
    return sum(((factor * state + summand) % 2**32).to_bytes(4, "little")) - 510


def slow_decode(form: TrellisFormat, packed: dict[str, Tensor], rows: int, cols: int) -> list:
    """The weights in the basis of the codes, from the stored bytes, bit by bit, in plain Python."""
    stream = bytes(packed["weight"].tolist())
    largest, step = packed["trellis_base"].tolist()
    by_row, by_strip = packed["trellis_rows"].tolist(), packed["trellis_strips"].tolist()
    bits = [stream[i // 8] >> (i % 8) & 1 for i in range(8 * len(stream))]
    weights = [[0.0] * cols for _ in range(rows)]
    at = 0
    for start in range(0, cols, 4):
        width = min(4, cols - start)
        places = [(r, start + c) for r in range(rows) for c in range(width)]
        rings = form.rings(len(places))
        for ring in range(rings.count):
            size = rings.steps * form.code_bits
            own = bits[at : at + size]
            at += size
            for k in range(rings.values):
                index = ring * rings.values + k
                if index == len(places):
                    break
                first = k // form.width * form.code_bits
                state = sum(own[(first + j) % size] << j for j in range(form.memory))
                r, c = places[index]
                scale = largest * 2 ** (step * (by_row[r] - 255) + (by_strip[start // 4] - 128) / 32)
                weights[r][c] = scale * slow_value(state, k % form.width) / 147.8
    return weights


@pytest.mark.parametrize("name", NAMES)
def test_names_read_back(name: str) -> None:
    assert parse(name).name == name
    assert resolve(name, group_size=64, dtype=torch.float16) == name


def test_the_usual_memory_is_not_said() -> None:
    assert parse("trellis2l12").name == "trellis2"
    assert parse("trellis3.5l13").name == "trellis3.5"
    assert parse("trellis3.5l12").name == "trellis3.5l12"


@pytest.mark.parametrize(
    "name", ["trellis", "trellis1", "trellis5", "trellis2.0", "trellis2l9", "trellis2l17", "trellis2g64"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"trellis1\.5 to trellis4 by halves"):
        parse(name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_the_stored_bits_decode_as_specified(name: str, shape: tuple[int, int]) -> None:
    form, (rows, cols) = make(name), shape
    value = random_codes(form, rows, cols)
    packed = form.pack(value)
    assert {key: (t.dtype, t.numel()) for key, t in packed.items()} == form.layout(rows, cols)
    assert form.nbytes(rows, cols) == sum(t.numel() * t.element_size() for t in packed.values())
    back = form.unpack(packed, rows, cols)
    assert all(torch.equal(a, b) for a, b in zip(back[:4], value[:4], strict=True))
    assert back.shape == shape
    expected = slow_decode(form, packed, rows, cols)
    rotated = form.decode_rotated(back)
    assert torch.allclose(rotated, torch.tensor(expected), rtol=1e-5, atol=0)
    decoded = form.decode(back)
    assert decoded.dtype == torch.float32
    assert torch.allclose(rotate_inputs(decoded), rotated, atol=1e-5 * float(rotated.abs().max()))


def test_known_sizes() -> None:
    # 64 x 64: 16 strips of two rings of 128 weights; scales of 64 rows and 16 strips, and four bytes beside them.
    assert parse("trellis2").nbytes(64, 64) == 64 * 64 * 2 // 8 + 64 + 16 + 4
    assert parse("trellis2.5").nbytes(64, 64) == 64 * 64 * 5 // 16 + 64 + 16 + 4
    # 172 rows: rings of 172 weights divide the strips.
    assert parse("trellis3").nbytes(172, 64) == 172 * 64 * 3 // 8 + 172 + 16 + 4
    # 509 rows are prime: 2036 = 16 * 127.25 weights a strip, 16 rings of 128 hold 12 more.
    assert parse("trellis2").nbytes(509, 4) == 16 * 128 * 2 // 8 + 509 + 1 + 4


@settings(deadline=None, max_examples=60)
@given(weights=st.integers(1, 70_000), name=st.sampled_from(NAMES))
def test_rings_hold_the_strip_with_little_to_spare(weights: int, name: str) -> None:
    form = make(name)
    rings = form.rings(weights)
    assert rings.count * rings.values >= weights > (rings.count - 1) * rings.values
    assert rings.values % form.width == 0
    assert rings.steps * form.width >= rings.values
    assert rings.steps * form.code_bits >= form.memory
    if weights >= 1000:
        assert rings.count * rings.steps * form.code_bits <= 1.02 * weights * form.half_bits / 2


def test_scales_are_near_what_is_wanted() -> None:
    wanted = torch.tensor([0.012, 0.02, 0.019, 0.1])
    base, codes = row_codes(wanted)
    assert torch.allclose(row_scales(base, codes), wanted, rtol=0.006)
    # Rows far below the largest coarsen the steps of all, to 2.2 % in each direction at worst; zeros are not zero.
    wanted = torch.tensor([1e-4, 2e-3, 0.1, 0.0])
    base, codes = row_codes(wanted)
    assert torch.allclose(row_scales(base, codes)[:3], wanted[:3], rtol=0.03)
    assert 0 < float(row_scales(base, codes)[3]) < 2e-6
    for level in (1e-7, 0.02, 3.0):
        wanted = torch.full((3,), level)
        assert torch.allclose(row_scales(*row_codes(wanted)), wanted, rtol=1e-3)
    nothing = row_scales(*row_codes(torch.zeros(3)))
    assert bool(((nothing > 0) & (nothing < 1e-7)).all())
    strip = torch.tensor([0.1, 1.0, 1.3, 14.0])
    assert torch.allclose(strip_scales(strip_codes(strip)), strip, rtol=0.011)


def test_segments_with_other_formats() -> None:
    trellis, dense = make("trellis2.5"), parse("float16")
    value, rest = random_codes(trellis, 40, 24), torch.randn(40, 9).half()
    flat = pack_segments([(trellis, value), (dense, rest)])
    entries = [{"format": "trellis2.5", "start": 0, "stop": 24}, {"format": "float16", "start": 24, "stop": 33}]
    decoded = decode_segments(flat, (40, 33), "cols", entries)
    assert torch.equal(decoded[:, :24], trellis.decode(value))
    assert torch.equal(decoded[:, 24:], rest.float())


def test_inputs_and_weights_meet_in_the_same_basis() -> None:
    form = make("trellis3")
    value = random_codes(form, 20, 96)
    x = torch.randn(5, 96)
    assert torch.allclose(x @ form.decode(value).T, rotate_inputs(x) @ form.decode_rotated(value).T, atol=1e-4)
    assert torch.equal(rotate_inputs(x), rotate(x, 1))
