"""Models that bitsandbytes packed: the stream computes transformers' logits, scores of activations work, others say why
they cannot. `bnb_models` wrote the files."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from circuitpress.anatomy import read_anatomy
from circuitpress.behaviors import Behavior, Pairs
from circuitpress.bnb import decode, packed_modules
from circuitpress.checkpoint import Weights, read_headers
from circuitpress.errors import CheckpointError
from circuitpress.score.attribution import attribution_patching
from circuitpress.score.direct import direct_effects
from circuitpress.score.gradients import integrated_gradients
from circuitpress.score.patching import patch
from circuitpress.score.rounded import rounding_effects
from circuitpress.stream import Stream, forward, open_stream
from circuitpress.units import UnitId

from .bnb_models import CASES, IDS, write

DATA = Path(__file__).parent / "data" / "bnb"


def logits(stream: Stream, ids: Tensor) -> Tensor:
    store = stream.store("walk")
    forward(stream, [ids], store)
    with torch.no_grad():
        return stream.logits(store.get((stream.depth, 0)))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str) -> None:
    expected = load_file(DATA / case / "expected.safetensors")["logits"]
    found = logits(open_stream(DATA / case), IDS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_logits_of_the_version_that_is_installed(case: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra bnb is not installed")
    write(case, tmp_path / case)
    expected = load_file(tmp_path / case / "expected.safetensors")["logits"]
    torch.testing.assert_close(logits(open_stream(tmp_path / case), IDS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (5, 7), (3, 96), (16, 40), (130, 131)])
def test_decoding_by_brute_force(rows: int, cols: int, twice: bool) -> None:
    """Blocks that end inside a row, a last byte of which only half is used, blocks of blocks."""
    draw = torch.Generator().manual_seed(rows)
    count, block = rows * cols, 64
    codes = torch.randint(16, (count,), generator=draw)
    table, blocks = torch.randn(16, generator=draw), -(-count // block)
    padded = torch.cat([codes, torch.zeros(count % 2, dtype=torch.long)]).view(-1, 2)
    tensors = {"m.weight": (padded[:, :1] * 16 + padded[:, 1:]).byte(), "m.weight.quant_map": table}
    state: dict[str, Any] = {"blocksize": block, "shape": [rows, cols]}
    if twice:
        inner, sizes, nested = torch.randn(256, generator=draw), torch.rand(-(-blocks // 256), generator=draw), []
        tensors["m.weight.absmax"] = torch.randint(256, (blocks,), generator=draw).byte()
        tensors |= {"m.weight.nested_quant_map": inner, "m.weight.nested_absmax": sizes}
        state |= {"nested_blocksize": 256, "nested_offset": 0.25}
        nested = [float(inner[int(tensors["m.weight.absmax"][i])] * sizes[i // 256]) + 0.25 for i in range(blocks)]
    else:
        tensors["m.weight.absmax"] = torch.rand(blocks, generator=draw)
        nested = tensors["m.weight.absmax"].tolist()
    expected = [float(table[int(code)]) * nested[i // block] for i, code in enumerate(codes)]
    found = decode(tensors.__getitem__, "m", rows, cols, state)
    torch.testing.assert_close(found, torch.tensor(expected).view(rows, cols))


def test_bytes_and_sizes() -> None:
    """All that a matrix needs counts: codes, maxima, table and state."""
    anatomy = read_anatomy(DATA / "nf4", packed_ok=True)
    assert anatomy.linear_numel == 4096 + 2 * 2048 + 4096 + 3 * 8192
    tensors = load_file(DATA / "nf4" / "model.safetensors")
    own = [tensor for name, tensor in tensors.items() if "_proj.weight" in name]
    assert anatomy.linear_bytes == sum(tensor.numel() * tensor.element_size() for tensor in own)
    assert 4.5 < anatomy.bits_per_weight < 4.8
    assert read_anatomy(DATA / "int8", packed_ok=True).bits_per_weight > 8


def test_codes_that_look_like_nan_are_read(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DATA / "fp4-as-bfloat16", tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = torch.full_like(tensors[name].view(torch.int16), -1).view(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    assert logits(open_stream(folder), IDS).isfinite().all()
    tensors[f"{name}.absmax"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="up_proj holds 64 NaN"):
        logits(open_stream(folder), IDS)


@pytest.mark.parametrize("case", ["nf4-twice", "nf4-gpt2", "int8"])
def test_scores_of_activations_are_those_of_the_dense_twin(case: str, tmp_path: Path) -> None:
    stream, twin = open_stream(DATA / case), open_stream(dense_twin(DATA / case, tmp_path / "dense"))
    last, answer, wrong = torch.tensor([[11, 11], [3, 4], [5, 6]])
    behavior = Behavior("toy", "logit_diff", Pairs(IDS, IDS.flip(0), last, answer, wrong))
    units = [unit for unit in stream.anatomy.units() if unit.kind == "head"]
    for scores in (
        lambda s: patch(s, behavior, units),
        lambda s: integrated_gradients(s, behavior),
        lambda s: attribution_patching(s, behavior),
        lambda s: direct_effects(s, behavior).scores,
    ):
        values = scores(stream).values
        assert abs(values).max() > 0.01
        np.testing.assert_allclose(values, scores(twin).values, rtol=1e-4, atol=1e-5)


def dense_twin(folder: Path, out: Path) -> Path:
    """The same weights in float32, as an ordinary checkpoint."""
    headers = read_headers(folder, packed_ok=True)
    tensors = load_file(folder / "model.safetensors")
    plain = {name: tensor for name, tensor in tensors.items() if name.split(".weight")[0] not in headers.foreign}
    plain = {name: tensor for name, tensor in plain.items() if not name.endswith(("SCB", "weight_format"))}
    for module in headers.foreign:
        weight = Weights(headers, "").decode(module)
        plain[f"{module}.weight"] = weight.T.contiguous() if ".h." in module else weight
    out.mkdir()
    save_file(plain, out / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_what_needs_the_original_weights_says_so() -> None:
    behavior = Behavior("toy", "logit_diff", Pairs(IDS, IDS.flip(0), *torch.tensor([[11, 11], [3, 4], [5, 6]])))
    with pytest.raises(CheckpointError, match=r"rounded already \(bitsandbytes\)") as caught:
        rounding_effects(open_stream(DATA / "nf4"), behavior, [UnitId(0, "head", 0)], ["int4"])
    assert "score the original checkpoint" in (caught.value.hint or "")
    with pytest.raises(CheckpointError, match=r"already quantized \(bitsandbytes\)") as caught:
        read_anatomy(DATA / "nf4")
    assert "circuitpress inspect" in (caught.value.hint or "")


def test_a_state_that_makes_no_sense_is_told(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DATA / "nf4", tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    tensors[name] = torch.tensor(list(json.dumps({"blocksize": 0, "shape": [3, 4]}).encode()), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not describe a 4-bit matrix"):
        read_headers(folder, packed_ok=True)
    with pytest.raises(CheckpointError, match="2 scales for 0 rows"):
        packed_modules({"a.SCB": (2,)}, lambda _: b"")
