"""benchmarks/lab/lengthen.py on a tiny model: the rotation fits the length, losses see the context that they name."""

import json
import math
from pathlib import Path
from types import ModuleType

import click
import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..scripts import load_script


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with few windows and a short memory."""
    script = load_script("benchmarks/lab/lengthen.py")
    monkeypatch.setattr(script, "TESTED", 2)
    monkeypatch.setattr(script, "NEAR", 5)
    monkeypatch.setattr(script, "EDGES", (0, 8, 16, 64, 128))
    return script


def lengthen(lab: ModuleType, checkpoint: Path, text: Path, out: Path) -> Result:
    """A run with 2 x 2 windows of 24 tokens and 2 of 77."""
    arguments = [checkpoint, "--text", text, "--test", text, "--out", out, "--length", 77]
    return CliRunner().invoke(
        lab.main,
        [str(each) for each in (*arguments, "--known", 32, "--short", 24, "--steps", 2, 2)],
        catch_exceptions=False,
    )


def test_the_checkpoint_knows_the_length_and_its_losses_are_its_own(
    lab: ModuleType, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    found = lengthen(lab, tiny_llama, text_file, tmp_path / "long")
    assert found.exit_code == 0
    assert "after, nats a token by position" in found.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "long", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "long")
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 77
    record = json.loads((tmp_path / "long" / "lengthened.json").read_text())
    assert record["of"] == tiny_llama.name
    assert (record["from"], record["to"]) == (32, 77)
    windows = torch.stack(list(lab.runs(text_file, tokenizer, [77, 77], 0)))
    with torch.no_grad():
        losses = model(windows, labels=windows).loss
        late = lab.token_losses(model, windows)[:, 63:].double().mean()
    whole = record["after"]["whole"]
    assert list(whole) == ["0-8", "8-16", "16-64", "64-128"]
    sizes = dict(zip(whole, (7, 8, 48, 13), strict=True))
    assert sum(whole[name] * size for name, size in sizes.items()) / 76 == pytest.approx(float(losses), rel=1e-5)
    assert whole["64-128"] == pytest.approx(float(late), rel=1e-6)
    assert record["after"] != record["before"]


def test_the_same_seed_gives_the_same_checkpoint(
    lab: ModuleType, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        lengthen(lab, tiny_llama, text_file, tmp_path / name)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_slow_pairs_turn_no_further_than_before_and_fast_ones_as_fast(
    lab: ModuleType, tiny_llama: Path, tmp_path: Path
) -> None:
    old, new = LlamaConfig.from_pretrained(tiny_llama), lab.lengthened(tiny_llama, 32, 1024)
    assert new.max_position_embeddings == 1024
    before, after = (LlamaRotaryEmbedding(config) for config in (old, new))
    assert after.inv_freq[0] == before.inv_freq[0]
    assert after.inv_freq[-1] * 1024 == pytest.approx(float(before.inv_freq[-1]) * 32)
    assert after.attention_scaling == pytest.approx(1 + 0.1 * math.log(32))
    new.save_pretrained(tmp_path / "scaled")
    with pytest.raises(click.ClickException, match="scaled already .yarn."):
        lab.lengthened(tmp_path / "scaled", 32, 2048)


def test_nearest_losses_see_one_to_two_pieces(lab: ModuleType, tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    ids = torch.arange(18) * 7 % model.config.vocab_size
    with torch.no_grad():
        found = lab.near_losses(model, ids)[0]
        for place in range(1, 18):
            start = max(0, (place - 1) // 5 * 5 - 5)
            logits = model(ids[None, start:place]).logits[0, -1]
            alone = torch.nn.functional.cross_entropy(logits, ids[place])
            assert float(found[place - 1]) == pytest.approx(float(alone), abs=1e-5)
    assert len(found) == 17


def test_a_text_that_is_too_short_is_refused(lab: ModuleType, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a line\nand another\n")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    with pytest.raises(click.ClickException, match="has no run of 500 tokens"):
        list(lab.runs(tmp_path / "short.txt", tokenizer, [500], 0))
