"""One matrix in several formats: along rows, along columns, and a whole menu in one pass."""

import pytest
import torch
from torch import Tensor

from circuitpress.formats import decode_segments, pack_segments
from circuitpress.quantize import quantize_everywhere, quantize_matrix
from circuitpress.quantize.matrix import Quantized, group_bounds

from .test_feedback import correlated, loss, normal

MENU = ("int2g16", "int8g16", "float32", "int3g64", "bfloat16", "int4g16", "int3g16")
OTHERS = ("int3g16s6", "int2g64s6", "code2", "code3g16", "int3g16+0.5%", "sym3g16", "sym4c", "nf4")
OTHERS += ("llmint8", "trellis2")


def same(a: Quantized, b: Quantized) -> bool:
    return torch.equal(a.decode(), b.decode()) and a.parts[0][0] == b.parts[0][0]


def test_group_bounds() -> None:
    assert group_bounds(0, 172, 64) == [(0, 64), (64, 128), (128, 172)]
    assert group_bounds(7, 20, 100) == [(7, 20)]
    assert group_bounds(4, 8, 2) == [(4, 6), (6, 8)]


def test_a_menu_in_one_pass_is_the_same_as_one_by_one() -> None:
    weight, hessian = normal(11, 45), correlated(45) * 1e-4
    together, note = quantize_everywhere(weight, hessian, MENU + OTHERS)
    assert note == ""
    assert list(together) == [*MENU, *OTHERS]
    for name in MENU + OTHERS:
        alone, _ = quantize_everywhere(weight, hessian, [name])
        assert same(alone[name], together[name]), name
        whole = quantize_matrix(weight, hessian, "rows", [(name, 0, 11)], polish=False)
        assert same(whole, together[name]), name
        assert together[name].shape == (11, 45)


def test_a_polished_menu_is_as_good_as_one_by_one() -> None:
    """Matrix products of other shapes differ in the last bit, which can move a descent to another end."""
    weight, hessian = normal(11, 45), correlated(45) * 1e-4
    together, _ = quantize_everywhere(weight, hessian, MENU + OTHERS, polish=True)
    for name in MENU + OTHERS:
        alone = quantize_matrix(weight, hessian, "rows", [(name, 0, 11)], polish=True)
        losses = [loss(weight, found.decode(), hessian) for found in (alone, together[name])]
        assert losses[0] == pytest.approx(losses[1], rel=0.1), name


def test_more_bits_cost_less() -> None:
    weight, hessian = normal(11, 45), correlated(45)
    menu = [f"int{bits}g16" for bits in range(2, 9)]
    rounded, _ = quantize_everywhere(weight, hessian, menu)
    losses = [loss(weight, rounded[name].decode(), hessian) for name in menu]
    assert all(after < 0.5 * before for before, after in zip(losses, losses[1:], strict=False))


@pytest.mark.parametrize("name", ["int2g16", "int4g64", *OTHERS[:-2]])
def test_polish_costs_nothing_and_pays(name: str) -> None:
    weight, hessian = normal(11, 45), correlated(45) * 1e-4
    plain, polished = (
        loss(weight, quantize_matrix(weight, hessian, "rows", [(name, 0, 11)], polish=p).decode(), hessian)
        for p in (False, True)
    )
    assert polished < 0.95 * plain


def test_casts_are_plain_roundings() -> None:
    weight = normal(5, 9)
    rounded, _ = quantize_everywhere(weight, torch.eye(9), ["float32", "bfloat16", "float16"])
    assert torch.equal(rounded["float32"].decode(), weight)
    assert torch.equal(rounded["bfloat16"].decode(), weight.bfloat16().float())
    assert torch.equal(rounded["float16"].decode(), weight.half().float())


def test_segments_of_rows_are_rounded_on_their_own() -> None:
    weight, hessian = normal(20, 37), correlated(37)
    segments = [("int3g16", 0, 3), ("float32", 3, 8), ("int5g32", 8, 9), ("int2g16", 9, 20)]
    mixed = quantize_matrix(weight, hessian, "rows", segments)
    assert mixed.axis == "rows"
    for (name, start, stop), (form, a, b, _) in zip(segments, mixed.parts, strict=True):
        alone = quantize_matrix(weight[start:stop], hessian, "rows", [(name, 0, stop - start)])
        assert torch.equal(mixed.decode()[start:stop], alone.decode())
        assert (form.name, a, b) == (name, start, stop)
    assert torch.equal(mixed.decode()[3:8], weight[3:8])


@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
def test_segments_of_columns_share_one_pass(kept: str) -> None:
    weight, hessian = normal(12, 50), correlated(50)
    segments = [("int3g16", 0, 21), (kept, 21, 33), ("int4g8", 33, 50)]
    mixed = quantize_matrix(weight, hessian, "cols", segments)
    decoded = mixed.decode()
    assert decoded.shape == (12, 50)
    exact = weight if kept == "float32" else weight.bfloat16().float()
    assert torch.equal(decoded[:, 21:33], exact[:, 21:33])
    assert [len(part[3].scales[0]) for part in mixed.parts if part[0].name != kept] == [2, 3]
    # Feedback between segments: together they lose less than each rounded alone.
    separate = torch.cat(
        [
            quantize_matrix(weight[:, a:b], hessian[a:b, a:b], "rows", [(name, 0, 12)]).decode()
            for name, a, b in segments
        ],
        1,
    )
    assert loss(weight, decoded, hessian) < 0.9 * loss(weight, separate, hessian)


@pytest.mark.parametrize("polish", [False, True])
def test_any_formats_along_the_columns(polish: bool) -> None:
    """Segments that cannot share a pass still make up for one another."""
    weight, hessian = normal(32, 60), correlated(60) * 1e-6
    segments = [
        ("code2g8", 0, 16),
        ("int3g8s6", 16, 32),
        ("float32", 32, 40),
        ("trellis3", 40, 56),
        ("int3g8+0.5%", 56, 60),
    ]
    mixed = quantize_matrix(weight, hessian, "cols", segments, polish=polish)
    decoded = mixed.decode()
    assert mixed.fallback == ""
    assert torch.equal(decoded[:, 32:40], weight[:, 32:40])
    assert [(form.name, a, b) for form, a, b, _ in mixed.parts] == segments
    alone = [
        quantize_matrix(weight[:, a:b], hessian[a:b, a:b], "rows", [(name, 0, 32)], polish=polish).decode()
        for name, a, b in segments
    ]
    assert loss(weight, decoded, hessian) < 0.8 * loss(weight, torch.cat(alone, 1), hessian)


def test_integers_with_short_scales_along_the_columns() -> None:
    weight, hessian = normal(20, 50), correlated(50)
    mixed = quantize_matrix(weight, hessian, "cols", [("int3g16s6", 0, 21), ("float32", 21, 33), ("int4g8", 33, 50)])
    form, _, _, value = mixed.parts[0]
    assert all(torch.equal(a, b) for a, b in zip(form.unpack(form.pack(value), 20, 21), value, strict=True))


def test_segments_in_turn_are_gptq_with_blocks() -> None:
    """Two segments of one column each: the second rounds what the formula of GPTQ asks for."""
    weight, hessian = normal(4, 2), torch.tensor([[2.0, 1.0], [1.0, 3.0]]) * 1e-4
    mixed = quantize_matrix(weight, hessian, "cols", [("code2", 0, 1), ("int4g1", 1, 2)], polish=False)
    first = mixed.decode()[:, 0]
    damping = 0.01 * float(hessian.diagonal().mean())
    wanted = weight[:, 1] - (first - weight[:, 0]) * hessian[0, 1] / (hessian[1, 1] + damping)
    torch.testing.assert_close(
        mixed.decode()[:, 1], wanted, rtol=2e-3, atol=1e-6
    )  # a group of one is exact but float16


def test_one_segment_of_columns_is_the_whole_matrix() -> None:
    weight, hessian = normal(6, 40), correlated(40)
    columns = quantize_matrix(weight, hessian, "cols", [("int3g16", 0, 40)])
    rows = quantize_matrix(weight, hessian, "rows", [("int3g16", 0, 6)])
    assert torch.equal(columns.decode(), rows.decode())


@pytest.mark.parametrize("axis", ["rows", "cols"])
def test_what_is_packed_decodes_to_what_was_rounded(axis: str) -> None:
    weight, hessian = normal(20, 43), correlated(43)
    segments = [
        ("int3g16", 0, 5),
        ("bfloat16", 5, 8),
        ("int3g8s6", 8, 12),
        ("code2g16", 12, 17),
        ("int7g8+0.5%", 17, 20),
    ]
    if axis == "cols":
        segments[-1] = ("int7g8+0.5%", 17, 43)
    rounded = quantize_matrix(weight, hessian, axis, segments)  # pyright: ignore[reportArgumentType]
    tensors = pack_segments([(form, value) for form, _, _, value in rounded.parts])
    entries = [{"format": name, "start": start, "stop": stop} for name, start, stop in segments]
    assert all(tensor.dim() == 1 for tensor in tensors.values())
    assert torch.equal(decode_segments(tensors, [20, 43], axis, entries), rounded.decode())


def test_fallbacks_are_noted() -> None:
    broken = torch.full((9, 9), torch.nan)
    rounded, note = quantize_everywhere(normal(4, 9), broken, ["int4g16", "int3g4", "float32"])
    assert note == "no usable Hessian: rounded to nearest"
    assert rounded["int4g16"].fallback == note
    assert rounded["float32"].fallback == ""
    for axis, stop in (("rows", 4), ("cols", 9)):
        mixed = quantize_matrix(normal(4, 9), broken, axis, [("int4g16", 0, stop)])  # pyright: ignore[reportArgumentType]
        assert mixed.fallback == note


def test_the_weight_itself_is_left_alone() -> None:
    weight, hessian = normal(4, 20), correlated(20)
    before: list[Tensor] = [weight.clone(), hessian.clone()]
    quantize_everywhere(weight, hessian, MENU)
    quantize_matrix(weight, hessian, "cols", [("int2g16", 0, 10), ("float32", 10, 20)])
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
