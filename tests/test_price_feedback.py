"""Prices of weights at their nearest codes, as llama.cpp rounds them."""

from pathlib import Path

import pytest
import torch

import circuitpress.price as pricing
from circuitpress.price import has_feedback, price
from circuitpress.rounding import block_hessians
from circuitpress.stream import open_stream

from .recorder import Recorder
from .whole import linears, load, tokens, weight


@pytest.mark.parametrize("kept", [pricing.KEPT_HESSIANS, 0], ids=["kept", "made again"])
def test_without_feedback_only_diagonals_are_left(
    kept: int, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every weight goes to the nearest code of its grid; whoever rounds later sees the same."""
    monkeypatch.setattr(pricing, "KEPT_HESSIANS", kept)
    recorder = Recorder()
    recorder.install(monkeypatch)
    ids, name = tokens(4, 6), "model.layers.1.mlp.down_proj"
    stream = open_stream(tiny_llama)
    costs = {}
    for feedback in (True, False):
        folder = tmp_path / str(feedback)
        recorder.calls.clear()
        costs[feedback] = price(stream, ids, formats=["int3g16"], folder=folder, feedback=feedback)[1].nats.sum()
        assert has_feedback(folder) == feedback
    dense = weight(linears(load(tiny_llama))[name])
    hessian, rounded = recorder.find(dense)
    torch.testing.assert_close(hessian, hessian.diagonal().diag())
    groups = zip(rounded["int3g16"].split(16, 1), dense.split(16, 1), strict=True)
    for values, wanted in groups:
        for row, target in zip(values, wanted, strict=True):
            levels = row.unique()
            inside = (target >= levels[0]) & (target <= levels[-1])
            nearest = (target[:, None] - levels).abs().min(1).values
            assert bool(((row - target).abs() <= nearest + 1e-6)[inside].all())
    assert costs[False] > costs[True]
    place, inputs = stream.anatomy.blocks[1], {}
    with stream.block(0) as module:
        inputs[0] = stream.run(0, module, stream.embed(ids))
    for feedback in (True, False):
        with stream.block(1) as module:
            again = block_hessians(stream, module, place, inputs.__getitem__, 1, tmp_path / str(feedback))[name]
        assert bool((again == again.diagonal().diag()).all()) != feedback
        torch.testing.assert_close(again.diagonal().double(), hessian.diagonal().double(), rtol=1e-3, atol=1e-12)
