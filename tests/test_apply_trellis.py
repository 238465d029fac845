"""A model with trellis segments, from prices to a folder that transformers loads: bytes, weights, logits."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from circuitpress.apply import apply
from circuitpress.evaluate import fidelity
from circuitpress.formats import decode_segments
from circuitpress.price import price
from circuitpress.runtime.linear import packed_linears
from circuitpress.stream import open_stream
from circuitpress.units import Decision, Plan

from .whole import linears, load, tokens, weight

FORMATS = ("trellis2l10", "trellis2.5l10", "int4g16", "float32")


def write(folder: Path, ids: Tensor, work: Path) -> tuple[Path, Plan]:
    """The model in which groups take turns with the formats, and its plan."""
    _, prices = price(open_stream(folder), ids, formats=FORMATS, folder=work / "priced")
    chosen = [(group, i % 4) for i, group in enumerate(prices.groups)]
    decisions = tuple(
        Decision(group, prices.formats[k], int(prices.nbytes[i, k]), float(prices.nats[i, k]))
        for i, (group, k) in enumerate(chosen)
    )
    plan = Plan(
        "test", "native", decisions, sum(d.nbytes for d in decisions), sum(group.numel for group in prices.groups), 0,
        sum(d.nats for d in decisions), None, 0.0,
    )  # fmt: skip
    apply(open_stream(folder), plan, ids, saliency=work / "priced", shards=work / "shards", out=work / "model")
    return work / "model", plan


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_a_written_trellis_model_loads_and_computes_what_was_stored(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    model, plan = write(folder, tokens(4, 8), tmp_path)
    tensors = {key: tensor for file in model.glob("*.safetensors") for key, tensor in load_file(file).items()}
    modules = json.loads((model / "config.json").read_text())["quantization_config"]["modules"]
    names = {segment["format"] for entry in modules.values() for segment in entry["segments"]}
    assert names == {"trellis2l10", "trellis2.5l10", "int4g16"}
    assert open_stream(model).anatomy.linear_bytes == plan.linear_bytes
    # The dense twin: every packed module decoded from the stored tensors into the original.
    twin, text = load(folder, torch.float32), tokens(3, 9, seed=1)
    maps = linears(twin)
    for module, entry in modules.items():
        own = {
            key.removeprefix(f"{module}."): tensor for key, tensor in tensors.items() if key.startswith(f"{module}.")
        }
        own.pop("bias", None)
        decoded = decode_segments(own, entry["shape"], entry["axis"], entry["segments"])
        before = weight(maps[module]).clone()
        assert 0 < float((decoded - before).norm() / before.norm()) < 0.6, module
        weight(maps[module]).copy_(decoded)
    packed = load(model, torch.float32)
    with torch.no_grad():
        expected, found = twin(text).logits, packed(text).logits
    assert packed_linears(packed).keys() == modules.keys()
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)
    measured = fidelity(open_stream(model), open_stream(folder), text)
    assert measured.linear_bytes == plan.linear_bytes
    with torch.no_grad():
        reference = load(folder, torch.float32)(text).logits.log_softmax(-1)
    kl = (reference.exp() * (reference - expected.log_softmax(-1))).sum(-1)
    assert measured.divergence.kl == pytest.approx(float(kl.mean()), rel=1e-4)
