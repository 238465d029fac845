"""Fidelity of streamed models against whole models in transformers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from circuitpress.errors import CircuitpressError
from circuitpress.evaluate import fidelity
from circuitpress.stream import open_stream

from ..whole import MODELS, divergence, load, rewrite, tokens


def disturb(folder: Path, out: Path) -> Path:
    """The same model with noise in its weights, another one for each tensor."""

    def change(state: dict[str, Tensor]) -> None:
        for i, tensor in enumerate(state.values()):
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i))
            tensor += (0.02 * noise).to(tensor.dtype)

    return rewrite(folder, out, change=change)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_qwen3"])
def test_against_whole_models(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    other = disturb(folder, tmp_path / "other")
    ids = tokens(5, 9)
    measured = fidelity(open_stream(other, batch_tokens=18), open_stream(folder, batch_tokens=27), ids)
    with torch.no_grad():
        p, q = (load(path)(ids).logits.double() for path in (folder, other))
    kl = divergence(p, q)
    assert float(kl.mean()) > 0.01
    result = measured.divergence
    # float32 logits near 10 are good to 1e-5; KL here is above 0.01.
    assert result.kl == pytest.approx(float(kl.mean()), rel=1e-3)
    assert result.kl_stderr == pytest.approx(float(kl.mean(1).std() / 5**0.5), rel=1e-3)
    assert result.top1_agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    for value, logits in ((result.reference_perplexity, p), (result.perplexity, q)):
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert value == pytest.approx(float(loss.exp()), rel=1e-4)
    assert result.tokens == 45
    weights = [path.stat().st_size for path in (other / "model.safetensors", folder / "model.safetensors")]
    assert [measured.bytes, measured.reference_bytes] == weights
    bits = 16 if name == "tiny_qwen3" else 32
    assert measured.bits_per_weight == bits
    assert measured.linear_bytes == open_stream(folder).anatomy.linear_numel * bits // 8


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_itself(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    result = fidelity(open_stream(folder), open_stream(folder), tokens(3, 7)).divergence
    assert (result.kl, result.top1_agreement) == (0.0, 1.0)
    assert result.perplexity == result.reference_perplexity


def test_logits_in_pieces(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a million tokens in the vocabulary four positions fit at a time: windows of ten come in three pieces."""
    other, ids = disturb(tiny_llama, tmp_path / "other"), tokens(3, 10)
    whole = fidelity(open_stream(other), open_stream(tiny_llama), ids).divergence
    streams = open_stream(other), open_stream(tiny_llama)
    sizes: list[int] = []
    for stream in streams:
        stream.anatomy = replace(stream.anatomy, vocab=1 << 20)
        monkeypatch.setattr(stream, "logits", counted(stream.logits, sizes))
    pieces = fidelity(*streams, ids).divergence
    assert sizes == [4, 4, 4, 4, 2, 2] * 3
    assert pieces.kl == pytest.approx(whole.kl, rel=1e-5)
    assert pieces.kl_stderr == pytest.approx(whole.kl_stderr, rel=1e-4)
    assert (pieces.tokens, pieces.perplexity) == (30, pytest.approx(whole.perplexity, rel=1e-5))


def counted(logits: Callable[[Tensor], Tensor], sizes: list[int]) -> Callable[[Tensor], Tensor]:
    def call(hidden: Tensor) -> Tensor:
        sizes.append(hidden.shape[0])
        return logits(hidden)

    return call


def test_the_document(tiny_llama: Path) -> None:
    document = fidelity(open_stream(tiny_llama), open_stream(tiny_llama), tokens(2, 5)).to_json()
    assert set(document) == {
        "perplexity", "reference_perplexity", "kl", "kl_stderr", "top1_agreement", "tokens", "bytes", "reference_bytes",
        "linear_bytes", "bits_per_weight", "seconds",
    }  # fmt: skip
    assert document["seconds"] >= 0


def test_other_vocabularies_are_refused(tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    small = rewrite(tiny_gpt2, tmp_path / "small", change=lambda s: s.update(_cut(s)), vocab_size=90)
    with pytest.raises(CircuitpressError, match="90 tokens, .* 97"):
        fidelity(open_stream(small), open_stream(tiny_llama), tokens(1, 4))
    # Another architecture with the same vocabulary is fine.
    assert fidelity(open_stream(tiny_gpt2), open_stream(tiny_llama), tokens(1, 4)).divergence.kl > 0.1


def _cut(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[:90] for name, tensor in state.items() if "wte" in name}


def test_progress_and_the_spill_folder(tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    notes: list[tuple[float, str]] = []
    model, reference = (open_stream(path, spill=tmp_path / "spill") for path in (tiny_llama, tiny_gpt2))
    fidelity(model, reference, tokens(2, 4), advance=lambda n, note: notes.append((n, note)))
    assert sum(n for n, _ in notes) == 6
    assert not list((tmp_path / "spill").glob("*"))
