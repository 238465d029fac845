"""Rounding a block by plan: the priced Hessians come back without gradients, segments tile, neurons return home."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import circuitpress.price as pricing
from circuitpress.price import price
from circuitpress.quantize import quantize_matrix
from circuitpress.rounding import block_hessians, context, decoded_in_place, round_block, segments_by_module
from circuitpress.segments import cut, groups_of
from circuitpress.stream import forward, open_stream
from circuitpress.units import Decision, Group

from .recorder import Recorder
from .whole import linears, load, tokens, weight


def decide(module: str, axis: str, *spans: tuple[int, int, str]) -> list[Decision]:
    from circuitpress.anatomy import Matrix

    matrix = Matrix(module, "q", 40, 30, False)
    return [
        Decision(Group(f"{start}", 0, (cut(matrix, axis, start, stop),)), form, 1, 0.0)  # pyright: ignore
        for start, stop, form in spans
    ]


def test_segments_are_ordered_by_place() -> None:
    decisions = decide("b", "cols", (10, 30, "int2g16"), (0, 10, "float32")) + decide("a", "rows", (0, 40, "int4g16"))
    assert segments_by_module(decisions) == {
        "a": ("rows", [("int4g16", 0, 40)]),
        "b": ("cols", [("float32", 0, 10), ("int2g16", 10, 30)]),
    }


@pytest.mark.parametrize(
    "decisions",
    [
        decide("m", "rows", (0, 10, "int4g16"), (11, 40, "int4g16")),
        decide("m", "rows", (0, 12, "int4g16"), (11, 40, "int4g16")),
        decide("m", "rows", (1, 40, "int4g16")),
        decide("m", "rows", (0, 40, "int4g16")) + decide("m", "cols", (0, 30, "int4g16")),
    ],
)
def test_segments_that_do_not_tile_are_refused(decisions: list[Decision]) -> None:
    with pytest.raises(ValueError, match="the segments of m do not tile it"):
        segments_by_module(decisions)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "rebuilt"])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_the_hessians_are_those_that_were_priced(
    name: str, kept: bool, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with other micro-batches than pricing had."""
    folder = request.getfixturevalue(name)
    if not kept:
        monkeypatch.setattr(pricing, "KEPT_HESSIANS", 0)
    recorder = Recorder()
    recorder.install(monkeypatch)
    ids = tokens(5, 7)
    price(open_stream(folder, batch_tokens=14), ids, formats=["int4g16"], draws=2, folder=tmp_path)
    stream = open_stream(folder, batch_tokens=21)
    batches = stream.batches(context(ids, tmp_path))
    assert (batches == []) == kept
    maps, seen = linears(load(folder, torch.float32)), []

    def visit(index: int, module: nn.Module, inputs: Callable[[int], Tensor]) -> None:
        place = stream.anatomy.blocks[index]
        for module_name, hessian in block_hessians(stream, module, place, inputs, len(batches), tmp_path).items():
            expected, _ = recorder.find(weight(maps[module_name]))
            # Sums of 35 products in another order.
            assert float((hessian - expected).abs().max()) < 1e-5 * float(expected.abs().max())
            seen.append(module_name)

    forward(stream, batches, stream.store("x"), visit=visit)
    assert sorted(seen) == sorted(maps)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_neurons_are_rounded_in_their_order_and_return(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    stream = open_stream(folder)
    place = stream.anatomy.blocks[2]
    order = torch.randperm(52, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    inputs = {m.module: torch.randn(60, m.cols, generator=generator) for m in place.matrices}
    hessians = {module: x.T @ x / 60 for module, x in inputs.items()}
    plan = segments_by_module(
        [Decision(group, "int3g16", 1, 0.0) for group in groups_of(place, "unit", neuron_block=20)]
    )
    maps = linears(load(folder, torch.float32))
    with stream.block(2) as module:
        found = decoded_in_place(round_block(module, place, plan, hessians, order), place, order)
        plain = decoded_in_place(round_block(module, place, plan, hessians, None), place, None)
    for matrix in place.matrices:
        dense, hessian, value = weight(maps[matrix.module]), hessians[matrix.module], found[place.local(matrix)]
        axis, segments = plan[matrix.module]
        if matrix.role in ("gate", "up"):
            expected = torch.empty_like(dense)
            expected[order] = quantize_matrix(dense[order], hessian, axis, segments).decode()  # pyright: ignore
        elif matrix.role == "down":
            expected = torch.empty_like(dense)
            rounded = quantize_matrix(dense[:, order], hessian[order][:, order], axis, segments)  # pyright: ignore
            expected[:, order] = rounded.decode()
        else:
            expected = quantize_matrix(dense, hessian, axis, segments).decode()  # pyright: ignore
        assert torch.equal(value, expected), matrix.role
        # Right place: each weight is near the one it stands for, nearer than to any other order.
        assert float((value - dense).abs().max()) < 0.5 * float(dense.abs().max())
        moved = float((value != plain[place.local(matrix)]).float().mean())
        # Rows do not depend on each other, but sums over many of them are made in another order: a near tie of two
        # grids may fall the other way in one group.
        assert moved > 0.5 if matrix.role == "down" else moved < 0.02
