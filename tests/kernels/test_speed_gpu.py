"""The benchmark of whole models on a GPU: without one it goes through every path, and its model decodes rightly."""

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch

from .processes import lines

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton has wheels for Linux only")


def test_every_path_runs_without_a_gpu() -> None:
    found = lines("speed_gpu.py", "--dry-run", "--bits", "mixed", "--compiled", "mixed", TRITON_INTERPRET="1")
    assert [(row["phase"], row["mode"]) for row in found] == [
        ("decode", "eager"), ("decode", "graph"), ("decode", "compiled"), ("prefill", "eager"),
    ]  # fmt: skip
    assert all(row["milliseconds"] is None and "error" not in row for row in found)


def test_copied_layers_are_layers_of_their_own_and_steps_decode_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    speed_gpu = importlib.import_module("speed_gpu")
    model = speed_gpu.build(speed_gpu.TINY, {4: 1.0, 2: 1.0}, "cpu")
    first, second = model.model.layers
    assert second.forward.args[0] is second and second.fusion[0].norm[0] is second.input_layernorm
    words = [dict(layer.named_buffers())["fusion.0.linear.words"] for layer in (first, second)]
    assert not torch.equal(*words)
    with torch.no_grad():
        decoder = speed_gpu.Decoder(model, 2, 5, 3, compiled=False, timed=False)
        texts = torch.arange(10).view(2, 5) % model.config.vocab_size
        texts = torch.cat([texts, decoder.token], 1)
        for _ in range(3):
            decoder.step()
            texts = torch.cat([texts, decoder.token], 1)
        whole = model(texts[:, :-1]).logits[:, 5:].argmax(-1)
    assert torch.equal(texts[:, 6:], whole)
