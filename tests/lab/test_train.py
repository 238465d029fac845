"""benchmarks/lab/train.py on a few steps: it learns, it resumes to the same bytes, what it writes loads."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from ..scripts import load_script


@pytest.fixture(scope="module")
def lab() -> ModuleType:
    """The script as a module (benchmarks/ is no package)."""
    return load_script("benchmarks/lab/train.py")


@pytest.fixture
def settings(lab: ModuleType):  # noqa: ANN201
    """Ten steps of a model of 3 heads on 1 KV head."""
    return lab.Settings(
        vocab=300, hidden=36, blocks=2, heads=3, kv_heads=1, neurons=44, window=23, positions=32, batch=5, steps=10,
        lr=1e-2, warmup=3, device="cpu",
    )  # fmt: skip


def test_resumed_equals_uninterrupted(lab: ModuleType, settings, text_file: Path, tmp_path: Path) -> None:
    losses: list[float] = []
    lab.train([text_file], tmp_path / "whole", settings, save_every=4, advance=lambda _, loss: losses.append(loss))
    assert len(losses) == 10
    assert losses[0] == pytest.approx(math.log(300), abs=0.3)
    assert losses[-1] < losses[0] - 0.5

    def stop(step: int, loss: float) -> None:
        del loss
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab.train([text_file], tmp_path / "twice", settings, save_every=4, advance=stop)
    assert not (tmp_path / "twice" / "model.safetensors").exists()
    again: list[int] = []
    lab.train([text_file], tmp_path / "twice", settings, save_every=4, advance=lambda step, _: again.append(step))
    assert again == [5, 6, 7, 8, 9, 10]
    for name in ("model.safetensors", "tokenizer.json", "config.json", "training/state.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes(), name

    finished: list[int] = []
    lab.train([text_file], tmp_path / "twice", settings, save_every=4, advance=lambda step, _: finished.append(step))
    assert finished == []


def test_the_checkpoint_loads(lab: ModuleType, settings, text_file: Path, text: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lab.train([text_file], tmp_path, replace(settings, steps=2))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(text[:200]).input_ids
    assert tokenizer.decode(ids) == text[:200]
    assert tokenizer.eos_token_id == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model(torch.tensor([ids[:23]])).logits.isfinite().all()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_other_settings_do_not_touch_a_run(lab: ModuleType, settings, text_file: Path, tmp_path: Path) -> None:
    lab.train([text_file], tmp_path, replace(settings, steps=1))
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="begun with other settings"):
        lab.train([text_file], tmp_path, replace(settings, steps=2))
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_text_is_tokenised_in_pieces_without_loss(
    lab: ModuleType, text_file: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab, "_PIECE", 1000)
    assert len(list(lab.pieces([text_file]))) > 20
    tokenizer: Tokenizer = lab.train_tokenizer([text_file], 300)
    lab.tokenise([text_file, text_file], tokenizer, tmp_path / "tokens.bin")
    ids = np.fromfile(tmp_path / "tokens.bin", dtype=np.uint32)
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == 2 * text.replace(
        "<|endoftext|>\n", "<|endoftext|>"
    )
    assert (ids == 0).sum() == 2 * text.count("<|endoftext|>")


def test_an_epoch_sees_every_window_once(lab: ModuleType, tmp_path: Path) -> None:
    np.arange(7 * 11 + 5, dtype=np.uint32).tofile(tmp_path / "tokens.bin")
    windows = lab.Windows(tmp_path / "tokens.bin", length=7, size=4, seed=3)
    assert windows.count == 11
    seen = torch.cat([windows.batch(step) for step in range(11)])  # 44 windows: four epochs
    for epoch in seen[:, 0].split(11):
        assert sorted(epoch.tolist()) == list(range(0, 77, 7))
    assert not torch.equal(seen[:11], seen[11:22])
    assert torch.equal(windows.batch(2), seen[8:12])
    with pytest.raises(SystemExit, match="fewer than one window"):
        lab.Windows(tmp_path / "tokens.bin", length=100, size=4, seed=3)


def test_learning_rate(lab: ModuleType) -> None:
    settings = lab.Settings(steps=50, warmup=10, lr=2.0, floor=0.1)
    rates = [lab.learning_rate(step, settings) for step in range(51)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[30] == pytest.approx(1.1)
    assert rates[50] == pytest.approx(0.2)


def test_the_command_line(lab: ModuleType, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--vocab 280 --hidden 24 --blocks 1 --heads 2 --kv-heads 1 --neurons 20 --window 16 --batch 2 --steps 1"
    lab.main([str(text_file), "--out", str(tmp_path), *options.split()])
    assert json.loads((tmp_path / "config.json").read_text())["intermediate_size"] == 20
    with pytest.raises(SystemExit):
        lab.main(["--help"])
    assert "examples:\n  python benchmarks/lab/train.py train.txt" in capsys.readouterr().out
