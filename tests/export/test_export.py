"""Every target written and loaded by its own consumer in a fresh process; what cannot be held is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from circuitpress.cli import invoke
from circuitpress.errors import CheckpointError, CircuitpressError, RecipeError
from circuitpress.export import check as checking
from circuitpress.export import export, open_source, packed, preview, write
from circuitpress.export.check import TOLERANCE, packed_logits, token_windows

from ..whole import load, tokens
from .conftest import Pack

FAR = 10
"""How much closer than the tolerance equal weights are."""


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def role(module: str) -> str:
    return module.rpartition(".")[2].removesuffix("_proj")


def mixed_ints(module: str) -> str:
    """One format for q, k, v and one for gate, up, another one in each layer."""
    if ".layers.1." in module and role(module) in ("gate", "up"):
        return "bfloat16"
    return {"o": "sym8g32", "down": "sym8c"}.get(role(module), "sym4g32" if ".0." in module else "sym4g64")


def test_compressed_tensors_with_16_bit_scales_biases_and_a_tied_head(qwen: Path, pack: Pack, tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "chat_template.jinja"):
        (qwen / name).write_text(name)
    source = pack(qwen, mixed_ints)
    document = export(source, "compressed-tensors", tmp_path / "out")
    error, largest = document["check"]["max_logit_error"], document["check"]["largest_logit"]
    assert error <= TOLERANCE * largest / FAR and largest > 1
    assert document == json.loads((tmp_path / "out" / "export.json").read_text())
    assert document["versions"].keys() == {"circuitpress", "torch", "transformers", "compressed-tensors"}
    assert document["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert {name: (tmp_path / "out" / name).read_text() for name in ("LICENSE", "USE_POLICY.md", "NOTICE.txt")}
    assert (tmp_path / "out" / "chat_template.jinja").exists() and (tmp_path / "out" / "tokenizer.json").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(config)
    assert len(parsed.config_groups) == 4
    linears = {m for block in source.anatomy.blocks for m in (matrix.module for matrix in block.matrices)}
    named = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert sorted(named + config["ignore"]) == sorted({*linears, "lm_head"})  # vLLM wants each to be in one of them
    scales = [t.dtype for name, t in tensors_of(tmp_path / "out").items() if name.endswith("weight_scale")]
    assert set(scales) == {torch.bfloat16} and len(scales) == 12
    assert not list(tmp_path.glob(".out*"))
    ids = tokens(2, 20)
    with torch.no_grad():  # the packed model itself, where codes are repacked for the kernels of this machine
        exact, half = (load(source.folder, dtype)(ids).logits.float() for dtype in (torch.float32, torch.bfloat16))
    assert float((half - exact).abs().mean()) < 0.05 * float(exact.abs().mean())


def test_bitsandbytes_nf4_beside_floating_conv1d(gpt2: Path, pack: Pack, tmp_path: Path) -> None:
    source = pack(gpt2, lambda module: "float32" if module.endswith("0.mlp.c_fc") else "nf4")
    document = export(source, "bitsandbytes", tmp_path / "out")
    assert document["check"]["max_logit_error"] <= TOLERANCE * document["check"]["largest_logit"] / FAR
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == ["transformer.h.0.mlp.c_fc", "lm_head"]
    stored = tensors_of(tmp_path / "out")
    assert stored["transformer.h.1.mlp.c_fc.weight"].shape == (64 * 128 // 2, 1)
    assert stored["transformer.h.0.mlp.c_fc.weight"].dtype == torch.float32


def test_bitsandbytes_int8_is_checked_without_and_with_rounded_activations(
    llama: Path, pack: Pack, tmp_path: Path
) -> None:
    source = pack(llama, lambda module: "float32" if role(module) == "o" else "llmint8")
    checked = export(source, "bitsandbytes", tmp_path / "out")["check"]
    assert checked["max_logit_error"] <= TOLERANCE * checked["largest_logit"] / FAR
    assert 0 < checked["as_is"]["kl"] < 0.1
    assert checked["as_is"]["max_logit_error"] > FAR * checked["max_logit_error"]


def test_dense_rounds_what_the_codes_stand_for(llama: Path, pack: Pack, tmp_path: Path) -> None:
    forms = {"q": "int3g16s6", "k": "code2", "v": "trellis2", "o": "int2g64+0.5%", "down": "nf4"}
    source = pack(llama, lambda module: forms.get(role(module), "int4g7"))
    document = export(source, "dense", tmp_path / "out", dtype=torch.float16)
    assert document["check"]["max_logit_error"] <= TOLERANCE * document["check"]["largest_logit"] / FAR
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float16"
    stored = tensors_of(tmp_path / "out")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    for module in source.headers.packed:
        assert torch.equal(stored[f"{module}.weight"], source.weights.decode(module).half())


def test_a_wrong_code_is_found_and_nothing_is_kept(
    llama: Path, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pack(llama, lambda _: "sym4g32")
    encode = packed.encode

    def broken(form: object, value: object, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        tensors = encode(form, value, dtype)  # pyright: ignore[reportArgumentType]
        tensors["weight_packed"][3, 1] ^= 1 << 4
        return tensors

    kind = write.Export(broken, packed.config, packed.PACKAGE)
    monkeypatch.setitem(write.EXPORTS, "compressed-tensors", kind)
    with pytest.raises(CircuitpressError, match="computes something else: logits differ by") as caught:
        export(source, "compressed-tensors", tmp_path / "out")
    assert caught.value.exit_code == 1
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_the_stranger_cannot_load_what_needs_circuitpress(llama: Path, pack: Pack) -> None:
    source = pack(llama, lambda _: "int4g32")
    ids = token_windows(97, 16)
    with pytest.raises(CircuitpressError, match="a fresh process cannot load the exported model"):
        checking.check(source.folder, ids, packed_logits(source.folder, ids))


@pytest.mark.parametrize(
    ("target", "choose", "reason"),
    [
        ("compressed-tensors", lambda m: "sym8g32" if role(m) == "k" else "sym4g32", "q_proj is sym4g32, k_proj is"),
        ("compressed-tensors", lambda _: "int4g32", "compressed-tensors has no int4g32"),
        ("compressed-tensors", lambda _: "sym4g128", "groups of 128 do not divide its 64 columns"),
        ("bitsandbytes", lambda m: "llmint8" if role(m) == "o" else "nf4", "nf4 and llmint8 are both there"),
    ],
)
def test_what_a_target_cannot_hold_is_refused(
    target: str, choose: object, reason: str, llama: Path, pack: Pack, tmp_path: Path
) -> None:
    source = pack(llama, choose)  # pyright: ignore[reportArgumentType]
    with pytest.raises(RecipeError, match=re.escape(reason)) as caught:
        export(source, target, tmp_path / "out")
    assert caught.value.exit_code == 2 and f"plan.target={target}" in str(caught.value.hint)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_conv1d_is_not_for_compressed_tensors(gpt2: Path, pack: Pack, tmp_path: Path) -> None:
    source = pack(gpt2, lambda _: "sym4g32")
    assert source.plain("transformer.h.0.mlp.c_fc").shape == (64, 128)  # as Conv1D stores it, inputs first
    with pytest.raises(RecipeError, match="Conv1D"):
        preview(source, "compressed-tensors", tmp_path / "out")


def test_foreign_folders_and_missing_packages_are_refused(
    llama: Path, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pack(llama, lambda _: "sym4g32")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(CircuitpressError, match="is there already and is no export"):
        preview(source, "dense", tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr("importlib.util.find_spec", lambda _: None)
        with pytest.raises(CircuitpressError, match="compressed-tensors is not installed") as caught:
            preview(source, "compressed-tensors", tmp_path / "out")
    assert caught.value.hint == "pip install 'circuitpress[vllm-format]'"
    config = json.loads((source.folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (source.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        open_source(source.folder)


def test_a_dry_run_writes_nothing(llama: Path, pack: Pack, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = pack(llama, lambda _: "sym4g32")
    arguments = ["export", str(source.folder), "--format", "compressed-tensors", "--out", str(tmp_path / "out")]
    before = sorted(tmp_path.rglob("*"))
    assert invoke([*arguments, "--dry-run", "--json"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    document = json.loads(capsys.readouterr().out)
    assert document["matrices"] == {"sym4g32": 14}
    assert document["advice"][0].endswith("the Marlin kernel takes multiples of 64 x 128")
