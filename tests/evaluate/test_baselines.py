"""Baselines against transformers' own dequantized weights, and what is said where they cannot be made."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from circuitpress.console import Advance, Console
from circuitpress.errors import CircuitpressError
from circuitpress.evaluate.baselines import BITSANDBYTES, Case, bitsandbytes, choose, measure_baselines
from circuitpress.run.summary import render_fidelity
from circuitpress.stream import open_stream

IDS = (torch.arange(3 * 11).view(3, 11) * 7) % 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths are multiples of 64, where bitsandbytes' own CPU code is right."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=16, initializer_range=0.3, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("baseline") / "dense"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", sorted(BITSANDBYTES))
def test_a_baseline_is_what_bitsandbytes_stores(name: str, checkpoint: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="baselines need the extra bnb")
    load: Any = AutoModelForCausalLM.from_pretrained
    theirs = load(checkpoint, quantization_config=BitsAndBytesConfig(**BITSANDBYTES[name]), device_map={"": "cpu"})
    theirs = theirs.dequantize(dtype=torch.float32).double().eval()
    dense = load(checkpoint).double().eval()
    with torch.no_grad():
        p, q = (model(IDS).logits.log_softmax(-1) for model in (dense, theirs))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    found = bitsandbytes(name, open_stream(checkpoint), IDS)
    assert found.divergence.kl == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-5
    assert found.bits_per_weight == pytest.approx({"nf4": 4.5, "int8": 8.4}[name], abs=0.5)


def test_others_are_named_with_the_command_that_has_them() -> None:
    with pytest.raises(CircuitpressError, match="no baseline called awq: there are nf4, int8, gptq") as caught:
        choose(["nf4", "awq"], {"gptq": lambda *_: {}})
    assert caught.value.hint is not None and "bench quality" in caught.value.hint


def test_one_that_cannot_be_made_leaves_the_others(checkpoint: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="baselines need the extra bnb")

    def broken(case: Case, advance: Advance) -> dict[str, Any]:
        assert case.linear_bytes == 17 and advance
        raise CircuitpressError("no network", hint="check it")

    case = Case(open_stream(checkpoint), IDS, IDS[:0], 17)
    quiet = Console(quiet=True)
    found = measure_baselines(choose(["gptq", "nf4"], {"gptq": broken}), case, quiet)
    assert found["gptq"] == {"error": "no network", "hint": "check it"}
    assert found["nf4"]["kl"] > 1e-5
    text = render_fidelity(found["nf4"] | {"baselines": found}, "model", "original")
    assert text.splitlines()[2].split() == ["reference", "model", "nf4"]
    assert "gptq is missing: no network\nnext: check it" in text
    found["gptq"] = found["nf4"] | {"setting": "GPTQModel 7, 3 bits, g64 asym"}
    text = render_fidelity(found["nf4"] | {"baselines": found}, "model", "original")
    assert text.splitlines()[2].split() == ["reference", "model", "gptq", "nf4"]
    assert "gptq: GPTQModel 7, 3 bits, g64 asym" in text and "missing" not in text


def test_without_bitsandbytes_the_extra_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def refuse(*_: object, **__: object) -> None:
        raise ImportError("Using `bitsandbytes` requires it")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    with pytest.raises(CircuitpressError, match="needs bitsandbytes") as caught:
        bitsandbytes("nf4", open_stream(checkpoint), IDS)
    assert caught.value.hint is not None and "circuitpress[bnb]" in caught.value.hint
