"""The command `cache`: prices, a plan and the bits in config.json, which a loaded model then has."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from circuitpress.cli import cli, invoke
from circuitpress.runtime.cache import PackedLayer, cache_bytes, make_cache


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint with a longer context."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_llama, copy)
    config = json.loads((copy / "config.json").read_text()) | {"max_position_embeddings": 256}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_the_bits_of_a_plan_reach_the_loaded_model(folder: Path, text_file: Path) -> None:
    command = ["cache", str(folder), "--budget", "30%", "--text", str(text_file), "--windows", "3", "--json"]
    done = CliRunner().invoke(cli, command, standalone_mode=False)
    assert done.exit_code == 0 and done.exception is None
    document = json.loads(done.stdout)
    assert document["bytes_of_a_token"] <= 0.3 * document["bytes_of_a_token_in_16_bits"] == 0.3 * 288
    assert document["predicted_kl"] > 0
    model = AutoModelForCausalLM.from_pretrained(folder)
    cache = make_cache(model)
    with torch.no_grad():
        model(torch.ones(1, 200, dtype=torch.long), past_key_values=cache)
    bits = [layer.bits for layer in cache.layers if isinstance(layer, PackedLayer)]
    assert [{"keys": list(own.keys), "values": list(own.values)} for own in bits] == document["layers"]
    assert cache_bytes(bits, 8, 200) == 128 * document["bytes_of_a_token"] + 72 * 288
    assert sum(document["keys"].values()) == sum(document["values"].values()) == 9


def test_windows_that_price_nothing_are_refused(
    tiny_llama: Path, text_file: Path, capfd: pytest.CaptureFixture
) -> None:
    assert invoke(["cache", str(tiny_llama), "--budget", "30%", "--text", str(text_file)]) == 1
    assert "windows of 64 tokens price nothing: 96 tokens stay in 16 bits" in capfd.readouterr().err
