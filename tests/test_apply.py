"""The written model: its bytes, its weights, its function, and what a resumed run leaves."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import circuitpress.apply as applying
from circuitpress.apply import apply
from circuitpress.errors import CircuitpressError
from circuitpress.evaluate import fidelity
from circuitpress.formats import decode_segments
from circuitpress.price import price
from circuitpress.segments import Granularity, split_protected
from circuitpress.stream import open_stream
from circuitpress.units import Decision, Plan, Prices, UnitId

from .whole import divergence, linears, load, rewrite, tokens, weight

FORMATS = ("int2g16", "int4g16", "int8g32", "float32")


def plan_of(prices: Prices, choose: Callable[[int], int]) -> Plan:
    """The plan that gives group i the format number `choose(i)`."""
    decisions = tuple(
        Decision(group, prices.formats[choose(i)], int(prices.nbytes[i, choose(i)]), float(prices.nats[i, choose(i)]))
        for i, group in enumerate(prices.groups)
    )
    return Plan(
        "test", "native", decisions, sum(d.nbytes for d in decisions), sum(group.numel for group in prices.groups), 0,
        sum(d.nats for d in decisions), None, 0.0,
        neuron_order={layer: tuple(order.tolist()) for layer, order in prices.neuron_order.items()},
    )  # fmt: skip


def price_tiny(folder: Path, ids: Tensor, out: Path, granularity: Granularity) -> Prices:
    return price(open_stream(folder), ids, formats=FORMATS, granularity=granularity, neuron_block=20, folder=out)[1]


def write(folder: Path, plan: Plan, ids: Tensor, work: Path, *, batch_tokens: int = 4096, dtype: str = "auto") -> Path:
    """Applies `plan`; the shards of the prices lie in work/priced."""
    stream = open_stream(folder, batch_tokens=batch_tokens, dtype=dtype)
    apply(stream, plan, ids, saliency=work / "priced", shards=work / "shards", out=work / "model")
    return work / "model"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stored(model: Path) -> dict[str, Tensor]:
    """All tensors of a written folder, read through its index."""
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {}
    for name, file in index.items():
        with safe_open(model / file, framework="pt") as reader:
            tensors[name] = reader.get_tensor(name)
    return tensors


def dense_twin(source: Path, model: Path) -> Any:
    """The original in transformers, float32, with every packed module's weights decoded into it, and all else as
    stored."""
    tensors, twin = stored(model), load(source, torch.float32)
    modules = json.loads((model / "config.json").read_text()).get("quantization_config", {}).get("modules", {})
    maps = linears(twin)
    with torch.no_grad():
        for name, entry in modules.items():
            keys = [key for key in tensors if key.rpartition(".")[0] == name and not key.endswith(".bias")]
            there = {key.rpartition(".")[2]: tensors.pop(key) for key in keys}
            weight(maps[name]).copy_(decode_segments(there, entry["shape"], entry["axis"], entry["segments"]))
    twin.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    return twin


CASES = [
    ("tiny_llama", "matrix"),
    ("tiny_llama", "unit"),
    ("tiny_gpt2", "matrix"),
    ("tiny_gpt2", "unit"),
    ("tiny_qwen3", "unit"),
]


@pytest.mark.parametrize(("name", "granularity"), CASES)
def test_the_written_model_is_what_was_planned(
    name: str, granularity: Granularity, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, ids = request.getfixturevalue(name), tokens(4, 8)
    prices = price_tiny(folder, ids, tmp_path / "priced", granularity)
    cycle = itertools.cycle([0, 3, 1, 2, 1])
    choices = [next(cycle) for _ in prices.groups]
    plan = plan_of(prices, lambda i: choices[i])
    model = write(folder, plan, ids, tmp_path)
    # Bytes: everything that belongs to a linear weight, counted in the files.
    tensors = stored(model)
    names = [f"{m}.{part}" for m in linears(load(folder)) for part in ("weight", "scales", "zeros", "dense")]
    assert sum(t.numel() * t.element_size() for n, t in tensors.items() if n in names) == plan.linear_bytes
    anatomy = open_stream(model).anatomy
    assert anatomy.linear_bytes == plan.linear_bytes
    assert anatomy.file_bytes == sum(file.stat().st_size for file in model.glob("*.safetensors"))
    # The files hold no more than what a budget for all files counts beside the linear weights.
    original = open_stream(folder).anatomy
    assert anatomy.file_bytes <= plan.linear_bytes + original.other_bytes + original.header_bytes
    # Function: the streamed packed model is the whole model with the decoded weights.
    text = tokens(3, 9, seed=1)
    with torch.no_grad():
        reference = load(folder, torch.float32)(text).logits
        expected = divergence(reference, dense_twin(folder, model)(text).logits)
    measured = fidelity(open_stream(model), open_stream(folder), text)
    assert float(expected.mean()) > 0.01
    # The same float32 numbers; KL near 1 from float32 logits.
    assert measured.divergence.kl == pytest.approx(float(expected.mean()), rel=1e-5)
    assert measured.linear_bytes == plan.linear_bytes
    assert measured.bits_per_weight == pytest.approx(plan.bits_per_weight, rel=1e-12)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_qwen3"])
def test_original_types_everywhere_leave_the_function_alone(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Neurons are permuted, nothing is rounded: every weight is an old one, and logits differ by the order of sums."""
    folder, ids = request.getfixturevalue(name), tokens(4, 8)
    kind = "bfloat16" if name == "tiny_qwen3" else "float32"
    _, prices = price(
        open_stream(folder), ids, formats=[kind], granularity="unit", neuron_block=20, folder=tmp_path / "priced"
    )
    assert not np.array_equal(prices.neuron_order[0], np.arange(len(prices.neuron_order[0])))
    model = write(folder, plan_of(prices, lambda _: 0), ids, tmp_path)
    config = json.loads((model / "config.json").read_text())
    assert "quantization_config" not in config
    text = tokens(2, 10, seed=2)
    with torch.no_grad():
        before, after = (load(path)(text).logits for path in (folder, model))
    assert float((before - after).abs().max()) < 1e-4  # norms are computed in float32
    old, new = load(folder).state_dict(), load(model).state_dict()
    assert old.keys() == new.keys()
    changed = {n for n in old if not torch.equal(old[n], new[n])}
    assert changed
    assert all("mlp" in n for n in changed)
    for n in changed:
        assert torch.equal(old[n].flatten().sort().values, new[n].flatten().sort().values)


def test_matrices_in_their_own_type_stay_as_they_were(tiny_llama: Path, tmp_path: Path) -> None:
    ids = tokens(4, 8)
    prices = price_tiny(tiny_llama, ids, tmp_path / "priced", "matrix")
    plan = plan_of(prices, lambda i: 3 if i % 2 else 1)
    model = write(tiny_llama, plan, ids, tmp_path)
    tensors, old = stored(model), load(tiny_llama, torch.float32).state_dict()
    kept = [d.group.name for d in plan.decisions if d.format == "float32"]
    modules = json.loads((model / "config.json").read_text())["quantization_config"]["modules"]
    assert len(kept) == 10
    assert not set(kept) & set(modules)
    rounded = {f"{name}.{part}" for name in modules for part in ("weight", "scales", "zeros")}
    assert set(tensors) == (set(old) | rounded)
    for name in set(old) - rounded:
        assert torch.equal(tensors[name], old[name]), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_that_are_kept_do_not_pass_through_the_compute_type(
    tiny_llama: Path, tmp_path: Path, dtype: str
) -> None:
    """Computing in 16 bits must not round what the plan keeps in float32: whole matrices, and segments of them."""
    ids = tokens(2, 8)
    prices = price_tiny(tiny_llama, ids, tmp_path / "priced", "matrix")
    anatomy = open_stream(tiny_llama).anatomy
    split = split_protected(prices, [UnitId(1, "head", 4), UnitId(1, "neuron", 9)], anatomy)
    plan = plan_of(split, lambda i: 3 if split.groups[i].name.endswith(("protected", "q_proj", "up_proj")) else 1)
    model = write(tiny_llama, plan, ids, tmp_path, dtype=dtype)
    twin, old = linears(dense_twin(tiny_llama, model)), linears(load(tiny_llama, torch.float32))
    assert torch.equal(weight(twin["model.layers.0.self_attn.q_proj"]), weight(old["model.layers.0.self_attn.q_proj"]))
    name = "model.layers.1.self_attn.o_proj"
    assert torch.equal(weight(twin[name])[:, 32:40], weight(old[name])[:, 32:40])
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(weight(twin[name])[:, 0], weight(old[name])[:, 9])


def test_two_floating_types_in_one_matrix_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """They would share one flat tensor, which has one type: bytes would exceed the plan."""
    ids = tokens(2, 8)
    _, prices = price(open_stream(tiny_llama), ids, formats=["bfloat16", "float32"], folder=tmp_path / "priced")
    split = split_protected(prices, [UnitId(1, "head", 4)], open_stream(tiny_llama).anatomy)
    plan = plan_of(split, lambda i: 1 if split.groups[i].name.endswith(":protected") else 0)
    with pytest.raises(CircuitpressError, match=r"layers\.1\.self_attn\.q_proj the types bfloat16 and float32"):
        write(tiny_llama, plan, ids, tmp_path)
    # Apart they are fine: one type a matrix.
    plan = plan_of(split, lambda i: int("layers.1." in split.groups[i].name))
    model = write(tiny_llama, plan, ids, tmp_path)
    assert open_stream(model).anatomy.linear_bytes == plan.linear_bytes


def test_protected_units_keep_their_weights_llama(tiny_llama: Path, tmp_path: Path) -> None:
    """Head 3 of group 1, group 2 and two neurons of layer 1 in float32, all else in two bits."""
    ids = tokens(4, 8)
    prices = price_tiny(tiny_llama, ids, tmp_path / "priced", "matrix")
    units = [UnitId(1, "head", 3), UnitId(1, "kv_group", 2), UnitId(1, "neuron", 51), UnitId(1, "neuron", 7)]
    split = split_protected(prices, units, open_stream(tiny_llama).anatomy)
    plan = plan_of(split, lambda i: 3 if split.groups[i].name.endswith(":protected") else 0)
    model = write(tiny_llama, plan, ids, tmp_path)
    new, old = linears(dense_twin(tiny_llama, model)), linears(load(tiny_llama, torch.float32))
    order = torch.from_numpy(split.neuron_order[1][:2])
    assert order.tolist() == [7, 51]
    prefix = "model.layers.1"
    heads = torch.cat([torch.arange(24, 32), torch.arange(32, 48)])  # head 3; heads 4 and 5 read group 2
    groups = torch.arange(8, 24)  # group 1, which head 3 reads, and group 2
    mine = {"q": (0, heads), "k": (0, groups), "v": (0, groups), "o": (1, heads)}
    for role, (dim, index) in mine.items():
        name = f"{prefix}.self_attn.{role}_proj"
        a, b = weight(new[name]), weight(old[name])
        assert torch.equal(a.index_select(dim, index), b.index_select(dim, index)), name
        rest = torch.tensor([i for i in range(b.shape[dim]) if i not in index.tolist()])
        assert not torch.isclose(a.index_select(dim, rest), b.index_select(dim, rest)).all(dim=1 - dim).any(), name
    for role, dim in (("gate", 0), ("up", 0), ("down", 1)):
        name = f"{prefix}.mlp.{role}_proj"
        a, b = weight(new[name]), weight(old[name])
        assert torch.equal(a.narrow(dim, 0, 2), b.index_select(dim, order)), name
    assert plan.linear_bytes == sum(
        t.numel() * t.element_size() for n, t in stored(model).items() if "_proj." in n and not n.endswith("bias")
    )


def test_protected_units_keep_their_weights_gpt2(tiny_gpt2: Path, tmp_path: Path) -> None:
    """Head 2 is three runs of rows of c_attn; biases of permuted neurons move with them."""
    ids = tokens(4, 8)
    prices = price_tiny(tiny_gpt2, ids, tmp_path / "priced", "matrix")
    units = [UnitId(0, "head", 2), UnitId(0, "neuron", 30)]
    split = split_protected(prices, units, open_stream(tiny_gpt2).anatomy)
    plan = plan_of(split, lambda i: 3 if split.groups[i].name.endswith(":protected") else 0)
    model = write(tiny_gpt2, plan, ids, tmp_path)
    twin, whole = dense_twin(tiny_gpt2, model), load(tiny_gpt2, torch.float32)
    new, old = linears(twin), linears(whole)
    rows = torch.cat([torch.arange(16, 24) + part * 40 for part in range(3)])
    name = "transformer.h.0.attn.c_attn"
    assert torch.equal(weight(new[name])[rows], weight(old[name])[rows])
    name = "transformer.h.0.attn.c_proj"
    assert torch.equal(weight(new[name])[:, 16:24], weight(old[name])[:, 16:24])
    assert torch.equal(weight(new["transformer.h.0.mlp.c_fc"])[0], weight(old["transformer.h.0.mlp.c_fc"])[30])
    assert torch.equal(
        weight(new["transformer.h.0.mlp.c_proj"])[:, 0], weight(old["transformer.h.0.mlp.c_proj"])[:, 30]
    )
    order = torch.from_numpy(split.neuron_order[0])
    bias = "transformer.h.0.mlp.c_fc.bias"
    assert torch.equal(stored(model)[bias], whole.state_dict()[bias][order])
    text = tokens(2, 9, seed=4)
    with torch.no_grad():
        kl = float(divergence(whole(text).logits, twin(text).logits).mean())
    assert fidelity(open_stream(model), open_stream(tiny_gpt2), text).divergence.kl == pytest.approx(kl, rel=1e-5)


@pytest.mark.parametrize("granularity", ["matrix", "unit"])
def test_resuming_gives_the_same_bytes(tiny_llama: Path, tmp_path: Path, granularity: Granularity) -> None:
    ids = tokens(5, 8)
    prices = price_tiny(tiny_llama, ids, tmp_path / "priced", granularity)
    plan = plan_of(prices, lambda i: (i * 7) % 4)
    first = contents(write(tiny_llama, plan, ids, tmp_path, batch_tokens=16))
    (folder,) = (tmp_path / "shards").iterdir()
    kept = folder / "block-00002.safetensors"
    stamp = kept.stat().st_mtime_ns
    for name in ("block-00001", "outer"):
        (folder / f"{name}.safetensors").unlink()
    assert contents(write(tiny_llama, plan, ids, tmp_path, batch_tokens=16)) == first
    assert kept.stat().st_mtime_ns == stamp
    # From nothing, in another folder.
    shutil.copytree(tmp_path / "priced", tmp_path / "again" / "priced")
    assert contents(write(tiny_llama, plan, ids, tmp_path / "again", batch_tokens=16)) == first


def test_shards_of_another_plan_are_not_used(tiny_llama: Path, tmp_path: Path) -> None:
    ids = tokens(3, 8)
    prices = price_tiny(tiny_llama, ids, tmp_path / "priced", "matrix")
    coarse, fine = plan_of(prices, lambda _: 0), plan_of(prices, lambda _: 2)
    before = contents(write(tiny_llama, coarse, ids, tmp_path))
    after = contents(write(tiny_llama, fine, ids, tmp_path))
    assert len(after["model-00002-of-00004.safetensors"]) > 2 * len(before["model-00002-of-00004.safetensors"])
    assert len(list((tmp_path / "shards").iterdir())) == 1  # a replanned run does not fill the disk
    assert contents(write(tiny_llama, coarse, ids, tmp_path)) == before


def test_a_failure_leaves_the_previous_model(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(3, 8)
    prices = price_tiny(tiny_llama, ids, tmp_path / "priced", "matrix")
    before = contents(write(tiny_llama, plan_of(prices, lambda _: 0), ids, tmp_path))
    real = applying.write_bytes_atomic

    def fail(path: Path, data: bytes) -> None:
        if path.name == "block-00002.safetensors":
            raise CircuitpressError("no space")
        real(path, data)

    monkeypatch.setattr(applying, "write_bytes_atomic", fail)
    with pytest.raises(CircuitpressError, match="no space"):
        write(tiny_llama, plan_of(prices, lambda _: 1), ids, tmp_path)
    assert contents(tmp_path / "model") == before


def test_the_folder_is_whole(tiny_llama: Path, tmp_path: Path) -> None:
    """Tokenizer and licence travel along; names, sizes and index agree; every tensor is in exactly one file."""
    folder = rewrite(tiny_llama, tmp_path / "source")
    (folder / "LICENSE").write_text("as before\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    ids = tokens(3, 8)
    prices = price_tiny(folder, ids, tmp_path / "priced", "matrix")
    model = write(folder, plan_of(prices, lambda _: 1), ids, tmp_path)
    names = {path.name for path in model.iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE", "chat_template.jinja"} < names
    files = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert sorted(name for name in names if name.endswith(".safetensors")) == files
    index = json.loads((model / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum((model / file).stat().st_size for file in files)
    inside = []
    for file in files:
        with safe_open(model / file, framework="pt") as reader:
            inside += [(name, file) for name in reader.keys()]  # noqa: SIM118 - safe_open is not a mapping
            assert reader.metadata()["format"] == "pt"
    assert dict(inside) == index["weight_map"]
    assert len(inside) == len(dict(inside))
    entry = json.loads((model / "config.json").read_text())["quantization_config"]
    assert (entry["quant_method"], entry["version"]) == ("circuitpress", 1)
    assert entry["modules"]["model.layers.2.mlp.down_proj"] == {
        "shape": [48, 52], "axis": "rows", "segments": [{"format": "int4g16", "start": 0, "stop": 48}],
    }  # fmt: skip
    assert not list(tmp_path.glob("**/*partial*"))


def test_where_hard_links_are_not_possible(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(2, 8)
    prices = price_tiny(tiny_llama, ids, tmp_path / "priced", "matrix")
    plan = plan_of(prices, lambda _: 1)
    first = contents(write(tiny_llama, plan, ids, tmp_path))

    def refuse(*_: object) -> None:
        raise OSError("not on this file system")

    monkeypatch.setattr(os, "link", refuse)
    assert contents(write(tiny_llama, plan, ids, tmp_path)) == first
