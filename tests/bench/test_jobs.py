"""Jobs of peers: what an adapter is given, what becomes of it, crashes, resuming, padding. The peer is a fake."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from circuitpress.anatomy import Anatomy, read_anatomy
from circuitpress.bench.environments import Environment
from circuitpress.bench.jobs import Outcome, Setting, run_peers
from circuitpress.bench.padding import neurons_to_pad, padding_is_silent, write_padded

FAKE = '''
"""Rounds to a grid of 1/bits, leaves the last matrix alone, and counts its calls."""
import os
from pathlib import Path
from safetensors.torch import load_file
from peers.protocol import Kept, affine_bytes

def quantize(job):
    with (Path(job.options["calls"])).open("a") as file:
        file.write(f"{job.bits} {tuple(job.tokens().shape)}\\n")
    if job.options.get("fail"):
        raise ValueError("out of luck")
    if job.options.get("die"):
        os._exit(9)
    found, tensors = {}, load_file(f"{job.checkpoint}/model.safetensors")
    for name in list(job.matrices)[:-1]:
        with job.timed():
            weight = (tensors[f"{name}.weight"] * job.bits).round() / job.bits
        found[name] = Kept(weight, affine_bytes(*weight.shape, job.bits, job.group_size, zero_bits=job.bits))
    return found
'''
HERE = Environment("here", ("torch",))


@pytest.fixture
def run(tiny_llama: Path, tmp_path: Path) -> Callable[..., list[Outcome]]:
    """Runs settings of the fake peer on the tiny Llama, each given as its bits and options."""
    adapter, ids = tmp_path / "fake.py", tmp_path / "ids.safetensors"
    adapter.write_text(FAKE)
    save_file({"ids": torch.arange(40).view(4, 10)}, ids)

    def start(*asked: tuple[int, dict[str, object]], shared: bool = False, padded: bool = False) -> list[Outcome]:
        calls = {"calls": str(tmp_path / "calls")}
        settings = [
            Setting("fake", "g16", str(adapter), "here", bits, 16, options | calls, padded=padded)
            for bits, options in asked
        ]
        return run_peers(
            settings, read_anatomy(tiny_llama), ids, environment=replace(HERE, shared=shared),
            python=Path(sys.executable), work=tmp_path / "work", threads=1, timeout=100.0,
        )  # fmt: skip

    return start


def calls(tmp_path: Path) -> list[str]:
    """What the fake peer wrote down, one line a call."""
    return (tmp_path / "calls").read_text().splitlines()


def test_weights_bytes_and_clocks(run: Callable[..., list[Outcome]], tiny_llama: Path, tmp_path: Path) -> None:
    (outcome,) = run((3, {}))
    assert outcome.error is None and outcome.weights is not None
    anatomy = read_anatomy(tiny_llama)
    matrices = [matrix for block in anatomy.blocks for matrix in block.matrices]
    original, decoded = load_file(tiny_llama / "model.safetensors"), load_file(outcome.weights)
    assert set(decoded) == {matrix.module for matrix in matrices[:-1]}
    for matrix in matrices[:-1]:
        assert torch.equal(decoded[matrix.module], (original[f"{matrix.module}.weight"] * 3).round() / 3)
    expected = sum(-(-int(m.numel * 3 + m.rows * -(-m.cols // 16) * 19) // 8) for m in matrices[:-1])
    assert outcome.linear_bytes == expected + 2 * matrices[-1].numel  # what the peer left alone counts 16 bits
    assert outcome.seconds > 0 and outcome.versions["torch"]
    assert outcome.budget == "3 bits, g16"
    assert calls(tmp_path) == ["3 (4, 10)"]


def test_what_is_done_is_not_done_again(run: Callable[..., list[Outcome]], tmp_path: Path) -> None:
    first = run((3, {}), (4, {}), shared=True)
    assert run((3, {}), (4, {}), shared=True) == first
    assert len(calls(tmp_path)) == 2
    run((3, {"other": 1}))
    assert len(calls(tmp_path)) == 3


def test_an_error_is_a_row_and_is_tried_again(run: Callable[..., list[Outcome]], tmp_path: Path) -> None:
    for times in (1, 2):
        (outcome,) = run((3, {"fail": True}))
        assert outcome.error == "ValueError: out of luck" and outcome.weights is None
        assert len(calls(tmp_path)) == times


def test_a_crash_costs_only_its_own_job(run: Callable[..., list[Outcome]]) -> None:
    outcomes = run((2, {}), (3, {"die": True}), (4, {}), shared=True)
    assert [outcome.error is None for outcome in outcomes] == [True, False, True]
    assert "ended with code 9 and no result" in str(outcomes[1].error)


def test_padded_checkpoints_compute_the_same(tiny_llama: Path, tmp_path: Path) -> None:
    anatomy = read_anatomy(tiny_llama)
    extra = neurons_to_pad(anatomy, 32)
    assert (anatomy.blocks[0].neurons, extra) == (52, 12)
    folder = write_padded(anatomy, extra, tmp_path / "padded")
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (tiny_llama, folder)]
    ids = torch.arange(30).view(2, 15)
    with torch.no_grad():
        before, after = (model(ids).logits for model in models)
    assert torch.allclose(before, after, rtol=0, atol=1e-12)
    assert read_anatomy(folder).blocks[0].neurons == 64


def test_padding_that_a_peer_disturbed_is_noticed(tiny_llama: Path) -> None:
    block = read_anatomy(tiny_llama).blocks[0]
    up, down = block.role("up").module, block.role("down").module
    weights = {up: torch.ones(64, 48), down: torch.ones(48, 64)}
    assert not padding_is_silent(block, weights)
    weights[up][52:] = 0
    assert padding_is_silent(block, weights)
    assert padding_is_silent(block, {})
    weights = {up: torch.ones(64, 48), down: torch.ones(48, 64)}
    weights[down][:, 52:] = 0
    assert padding_is_silent(block, weights)


def test_models_without_gates_are_not_padded(tiny_gpt2: Path) -> None:
    assert neurons_to_pad(read_anatomy(tiny_gpt2), 32) == 0


def test_padded_jobs_see_the_padded_shapes(run: Callable[..., list[Outcome]], tiny_llama: Path) -> None:
    (outcome,) = run((3, {}), padded=True)
    assert outcome.error is None and outcome.weights is not None
    assert outcome.settings["padded_neurons"] == 12
    job = json.loads((outcome.weights.parent / "job.json").read_text())
    anatomy: Anatomy = read_anatomy(tiny_llama)
    assert job["matrices"][anatomy.blocks[0].role("gate").module] == [64, 48]
    assert load_file(outcome.weights)[anatomy.blocks[0].role("gate").module].shape == (64, 48)
