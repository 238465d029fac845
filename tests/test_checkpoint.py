"""Checkpoints on disk: what is read, and every way in which a folder cannot be used."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from circuitpress.checkpoint import Weights, read_headers, resolve_checkpoint
from circuitpress.errors import CheckpointError

from .whole import rewrite


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut_header(folder: Path) -> None:
    """The file ends inside its own header."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def cut_body(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def garbage_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 5) + b"{]]{{")


def header_of_another_kind(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]")


def header_without_offsets(folder: Path) -> None:
    text = json.dumps({"a": {"dtype": "F32", "shape": [1]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


def lose_a_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config cut": (
        lambda folder: (folder / "config.json").write_text('{"model_type": '),
        "config.json is not valid JSON",
    ),
    "config of another kind": (lambda folder: (folder / "config.json").write_text("[1, 2]"), "config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
    "pickle": (pickle_only, r"only pytorch_model.bin \(pickle is never read\)"),
    "empty file": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors is truncated"),
    "seven bytes": (lambda folder: (folder / "model.safetensors").write_bytes(b"1234567"), "is truncated"),
    "header cut": (cut_header, "truncated: its header does not fit in 100 bytes"),
    "body cut": (cut_body, r"model.safetensors is truncated: \d+ bytes where its header promises \d+"),
    "longer": (lengthen, "where its header promises"),
    "garbage": (garbage_header, "is not a safetensors file"),
    "list": (header_of_another_kind, "is not a safetensors file"),
    "no offsets": (header_without_offsets, "is not a safetensors file"),
    "missing shard": (lose_a_shard, "index.json names model-00002-of-00002.safetensors, which are not there"),
    "index cut": (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "index.json"),
    "index of another kind": (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "index.json"),
    "gptq": (
        lambda folder: edit_config(folder, quantization_config={"quant_method": "gptq"}),
        r"already quantized \(gptq\)",
    ),
    "ours": (
        lambda folder: edit_config(folder, quantization_config={"quant_method": "circuitpress"}),
        r"already quantized \(circuitpress\)",
    ),
    "unnamed": (
        lambda folder: edit_config(folder, quantization_config={"bits": 4}),
        r"already quantized \(unknown method\)",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_used_is_told(copy: Path, case: str) -> None:
    spoil, message = BROKEN[case]
    spoil(copy)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_headers(copy)
    assert caught.value.hint
    assert str(copy) in caught.value.message


def test_a_file_is_no_folder(copy: Path) -> None:
    with pytest.raises(CheckpointError, match="config.json is not a folder"):
        read_headers(copy / "config.json")


def test_headers_are_those_of_the_file(tiny_qwen3: Path) -> None:
    headers = read_headers(tiny_qwen3)
    tensors = load_file(tiny_qwen3 / "model.safetensors")
    assert set(headers.tensors) == set(tensors)
    for name, tensor in tensors.items():
        header = headers.tensors[name]
        assert (header.shape, header.nbytes) == (tuple(tensor.shape), tensor.numel() * 2)
        assert headers.dtype(name) == "bfloat16"
    assert headers.file_bytes == (tiny_qwen3 / "model.safetensors").stat().st_size
    assert headers.packed == {}


def test_no_quantization_may_be_spelled_null(copy: Path) -> None:
    edit_config(copy, quantization_config=None)
    assert read_headers(copy).packed == {}


def test_other_number_types_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    folder = rewrite(tiny_llama, tmp_path / "double", change=lambda s: s.update({name: s[name].double()}))
    with pytest.raises(CheckpointError, match=f"tensor {name} is stored as F64"):
        read_headers(folder).dtype(name)


def shard(folder: Path, parts: int) -> None:
    """Deals the tensors of model.safetensors to several files with an index."""
    state = load_file(folder / "model.safetensors")
    names = [f"model-{i + 1:05d}-of-{parts:05d}.safetensors" for i in range(parts)]
    index = {name: names[i % parts] for i, name in enumerate(state)}
    for file in names:
        save_file({name: state[name] for name in state if index[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_sharded_checkpoints(tiny_llama: Path, copy: Path) -> None:
    shard(copy, 3)
    whole, parts = read_headers(tiny_llama), read_headers(copy)
    assert {n: (h.shape, h.dtype) for n, h in parts.tensors.items()} == {
        n: (h.shape, h.dtype) for n, h in whole.tensors.items()
    }
    assert parts.file_bytes == sum(path.stat().st_size for path in copy.glob("*.safetensors"))
    state = load_file(tiny_llama / "model.safetensors")
    weights = Weights(parts, "model.")
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in state.items())
    (copy / "model-00002-of-00003.safetensors").write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match="model-00002-of-00003.safetensors is truncated"):
        read_headers(copy)


def test_a_prefix_may_be_left_out(tiny_gpt2: Path, tmp_path: Path) -> None:
    """The first GPT-2 checkpoints name `h.0.attn...` what others name `transformer.h.0.attn...`."""

    def strip(state: dict[str, torch.Tensor]) -> None:
        for name in list(state):
            state[name.removeprefix("transformer.")] = state.pop(name)

    bare = rewrite(tiny_gpt2, tmp_path / "bare", change=strip)
    full, short = (Weights(read_headers(folder), "transformer.") for folder in (tiny_gpt2, bare))
    for name, tensor in load_file(tiny_gpt2 / "model.safetensors").items():
        assert torch.equal(short.read(name), tensor)
        stored = name.removeprefix("transformer.")
        assert (full.stored_name(name), short.stored_name(name)) == (name, stored)
        assert full.model_name(name) == short.model_name(stored) == name
    assert short.stored_name("transformer.h.9.attn.c_attn.weight") is None
    assert short.model_name("lm_head.weight") == "lm_head.weight"


def test_missing_and_broken_tensors(tiny_llama: Path, tmp_path: Path) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["model.norm.weight"][:3] = torch.nan

    folder = rewrite(tiny_llama, tmp_path / "bad", change=spoil)
    weights = Weights(read_headers(folder), "model.")
    with pytest.raises(CheckpointError, match="tensor model.norm.weight holds 3 NaN or infinite values"):
        weights.read("model.norm.weight")
    with pytest.raises(CheckpointError, match="has no tensor model.layers.7.weight"):
        weights.read("model.layers.7.weight")


def test_local_folders_are_taken_as_they_are(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_checkpoint(str(copy)) == copy
    monkeypatch.chdir(copy.parent)
    assert resolve_checkpoint("model") == Path("model")
    monkeypatch.setenv("HOME", str(copy.parent))
    assert resolve_checkpoint("~/model") == copy


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "~/nowhere", "nowhere", "a/b/c"])
def test_what_is_no_folder_and_no_hub_id(model: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder") as caught:
        resolve_checkpoint(model)
    assert caught.value.hint is not None and "user/name" in caught.value.hint


def test_hub_ids(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Repository and revision are passed on; code is fetched only when it is trusted; pickles never."""
    import huggingface_hub

    calls = []

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repo, revision))
        assert not any(
            pattern.endswith((".bin", ".pt", ".pkl", "*"))
            for pattern in allow_patterns
            if pattern not in ("LICENSE*", "NOTICE*", "USE_POLICY*")
        )
        assert ("*.py" in allow_patterns) == (len(calls) == 3)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_checkpoint("user/name") == tmp_path
    resolve_checkpoint("user/name@v1.0")
    resolve_checkpoint("user/name@main", trust_remote_code=True)
    assert calls == [("user/name", None), ("user/name", "v1.0"), ("user/name", "main")]


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match="user/name: no such folder, and the Hub cannot be reached"):
        resolve_checkpoint("user/name")
