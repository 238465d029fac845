"""GPTQ as a baseline: which setting is nearest, what it stores, and that it is judged and found again."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from circuitpress.anatomy import read_anatomy
from circuitpress.bench import gptq as module
from circuitpress.bench.environments import VARIABLE
from circuitpress.bench.gptq import gptq, nearest, stored
from circuitpress.bench.jobs import Setting
from circuitpress.console import ignore
from circuitpress.errors import CircuitpressError
from circuitpress.evaluate.baselines import Case
from circuitpress.stream import open_stream

from ..whole import tokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FAKE = """
from pathlib import Path
from peers.protocol import Kept, affine_bytes

def quantize(job):
    with Path(job.options["calls"]).open("a") as file:
        file.write(f"{tuple(job.tokens().shape)}\\n")
    found = {}
    for name, linear in job.linears(job.load()).items():
        with job.timed():
            weight = (linear.weight.detach() * 4).round() / 4
        found[name] = Kept(weight, affine_bytes(*weight.shape, job.bits, 16, zero_bits=job.bits))
    return found
"""


@pytest.fixture(scope="module")
def stories(build_checkpoint: Callable[[str, "PretrainedConfig"], Path]) -> Path:
    """Random weights in the shapes of stories260K."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=172, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=32,
    )  # fmt: skip
    return build_checkpoint("shapes-of-stories260K", config)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A peer that rounds to quarters, in this environment; the file says what it was called with."""
    adapter, calls = tmp_path / "fake.py", tmp_path / "calls"
    adapter.write_text(FAKE)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "peers"))
    monkeypatch.setattr(module, "ensure", lambda *_, **__: Path(sys.executable))

    def setting(*_: object) -> Setting:
        return Setting("fake", "g16", str(adapter), "gptqmodel", 3, 16, {"calls": str(calls)}, padded=True)

    monkeypatch.setattr(module, "nearest", setting)
    return calls


def test_bytes_are_those_that_gptqmodel_was_measured_to_store(stories: Path) -> None:
    """Two rows of benchmarks/results/quality.json: stories260K at 2 bits."""
    anatomy = read_anatomy(stories)
    assert (stored(anatomy, 2, 64), stored(anatomy, 2, 32)) == (70080, 78720)


def test_the_nearest_setting_is_taken(stories: Path) -> None:
    anatomy = read_anatomy(stories)
    for bits in (2, 3, 4, 8):
        for group in (64, 32):
            for off in (-3, 0, 3):
                found = nearest(anatomy, stored(anatomy, bits, group) + off)
                assert (found.bits, min(found.group_size, 64)) == (bits, group), off
    assert nearest(anatomy, 1).bits == 2 and nearest(anatomy, 10**9).bits == 8


def test_it_is_judged_once_made_and_found_again(tiny_llama: Path, fake: Path) -> None:
    ids = tokens(7, 12)
    case = Case(open_stream(tiny_llama, dtype="float32"), ids[:3], ids[3:], 1000)
    found = gptq(case, ignore)
    assert gptq(case, ignore) == found
    assert fake.read_text().splitlines() == ["(4, 12)"]
    assert found["kl"] > 1e-4 and found["tokens"] == ids[:3].numel()
    assert found["bits_per_weight"] == pytest.approx(8 * found["linear_bytes"] / case.reference.anatomy.linear_numel)
    assert found["bytes"] == found["linear_bytes"] + case.reference.anatomy.other_bytes
    assert found["setting"].endswith("3 bits, g16")
    with pytest.raises(CircuitpressError, match="no text is left"):
        gptq(Case(case.reference, ids, torch.empty(0, 12, dtype=torch.int64), 1000), ignore)


def test_what_fails_is_an_error_with_the_place_of_its_log(
    tiny_llama: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ensure", lambda *_, **__: Path("/bin/false"))
    ids = tokens(4, 12)
    with pytest.raises(CircuitpressError, match="GPTQModel at 3 bits, g16 failed: the process ended") as caught:
        gptq(Case(open_stream(tiny_llama), ids[:2], ids[2:], 1000), ignore)
    assert caught.value.hint is not None and "its log" in caught.value.hint
    assert not fake.exists()
