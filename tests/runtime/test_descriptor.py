"""Descriptors: reading, refusing, and cutting flat tensors into parts."""

import pytest
import torch

from circuitpress.errors import CheckpointError
from circuitpress.runtime import descriptor as module
from circuitpress.runtime.descriptor import Descriptor


def _entry(axis: str, *segments: tuple[str, int, int], shape: tuple[int, int] = (70, 172)) -> dict:
    cut = [{"format": name, "start": start, "stop": stop} for name, start, stop in segments]
    return {"shape": list(shape), "axis": axis, "segments": cut}


def test_layout_adds_up_the_segments() -> None:
    mixed = Descriptor.from_json(
        "m", _entry("cols", ("int3g64", 0, 100), ("int4g32", 100, 171), ("bfloat16", 171, 172))
    )
    # 7000 and 4970 codes of 3 and 4 bits; 140 and 210 groups, whose zeros have 3 and 4 bits as well.
    assert mixed.layout() == {
        "weight": (torch.uint8, 2625 + 2485),
        "scales": (torch.float16, 140 + 210),
        "zeros": (torch.uint8, 53 + 105),
        "dense": (torch.bfloat16, 70),
    }


@pytest.mark.parametrize(
    ("axis", "segments"),
    [
        ("rows", [("int4g32", 0, 3), ("int2g64", 3, 70)]),
        ("cols", [("int3g64", 0, 100), ("int4g32", 100, 171), ("float16", 171, 172)]),
        ("rows", [("int7g64", 0, 70)]),
    ],
)
@pytest.mark.parametrize("stripe", [1, 172 * 64, 1 << 20])
def test_decode_in_stripes_is_exact(axis, segments, stripe, matrix_packer, monkeypatch) -> None:
    monkeypatch.setattr(module, "_STRIPE", stripe)
    flat, decoded = matrix_packer(torch.randn(70, 172), axis, segments)
    described = Descriptor.from_json("m", _entry(axis, *segments))
    assert {name: (tensor.dtype, tensor.numel()) for name, tensor in flat.items()} == described.layout()
    assert torch.equal(described.decode(flat), decoded)
    assert torch.equal(described.decode(flat, dtype=torch.bfloat16), decoded.bfloat16())


@pytest.mark.parametrize(
    ("entry", "cause"),
    [
        (_entry("rows", ("int4g32", 0, 69)), r"start at \(0,\) and stop at \(69,\): they must fill 0:70"),
        (_entry("cols", ("int4g32", 0, 64), ("int4g32", 96, 172)), "they must fill 0:172"),
        (_entry("rows", ("int4g32", 5, 5)), "a segment runs from 5 to 5"),
        (_entry("diagonal", ("int4g32", 0, 70)), "axis is 'diagonal'"),
        (_entry("rows", ("int9g32", 0, 70)), "'int9g32' is not a format"),
        (_entry("rows", ("bfloat16", 0, 70)), "no segment is packed"),
        (_entry("rows", ("int4g32", 0, 10), ("bfloat16", 10, 20), ("float16", 20, 70)), "store 'dense' as"),
        ({"shape": [70, 172], "axis": "rows"}, "'segments' is missing"),
    ],
)
def test_a_damaged_descriptor_is_named(entry: dict, cause: str) -> None:
    with pytest.raises(CheckpointError, match=cause) as caught:
        Descriptor.from_json("model.layers.3.mlp.up_proj", entry)
    assert "model.layers.3.mlp.up_proj" in caught.value.message
    assert caught.value.hint
