"""The whole comparison on a tiny Llama with a fake peer: rows, judge, our side, controls, resuming, the command."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from circuitpress.anatomy import read_anatomy
from circuitpress.bench import Comparison, compare
from circuitpress.bench.controls import nearest, random_choice
from circuitpress.bench.jobs import Setting
from circuitpress.bench.methods import PEERS, settings
from circuitpress.cli import invoke
from circuitpress.console import Console
from circuitpress.data import load_windows
from circuitpress.errors import CircuitpressError
from circuitpress.formats import IntFormat
from circuitpress.recipe import Recipe

FAKE = """
from peers.protocol import Kept, affine_bytes

def quantize(job):
    found = {}
    for name, linear in job.linears(job.load()).items():
        with job.timed():
            weight = (linear.weight.detach() * 4).round() / 4
        found[name] = Kept(weight, affine_bytes(*weight.shape, job.bits, 16, zero_bits=16))
    return found
"""
RECIPE = """
model: {model}
quantize: {{group_size: 16}}
plan: {{formats: [int2, int3, int4, int8], probes: [], swaps: 0}}
run: {{device: cpu}}
"""


@pytest.fixture(scope="module")
def rows(tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """The rows of a comparison with one fake peer at two nominal widths."""
    folder = tmp_path_factory.mktemp("quality")
    (folder / "fake.py").write_text(FAKE)
    (folder / "recipe.yaml").write_text(RECIPE.format(model=tiny_llama))
    chosen = [Setting("fake", "g16", str(folder / "fake.py"), "light", bits, 16, padded=bits == 3) for bits in (2, 3)]
    comparison = Comparison(
        str(tiny_llama), text_file, {}, chosen, folder / "work", folder / "none", python=Path(sys.executable),
        recipe=Recipe.load(folder / "recipe.yaml"), budgets=(4.5, 6.0, 1.0), samples=16, windows=5, length=24,
    )  # fmt: skip
    console = Console(quiet=True, json=False, debug=False)
    first = compare(comparison, console)
    again = compare(comparison, console)
    drop = ("seconds", "cpu_seconds")
    assert [{k: v for k, v in row.items() if k not in drop} for row in again] == [
        {k: v for k, v in row.items() if k not in drop} for row in first
    ]
    return first


def only(rows: list[dict[str, object]], method: str) -> list[dict[str, object]]:
    """The rows of one method."""
    return [row for row in rows if row["method"] == method]


def test_every_method_has_its_rows(rows: list[dict[str, object]]) -> None:
    assert {row["method"] for row in rows} == {
        "fake", "circuitpress", "control:uniform", "control:nearest", "control:magnitude", "control:fisher",
        "control:random", "exllamav3", "qtip",
    }  # fmt: skip
    assert len(only(rows, "circuitpress")) == 3
    failed = {(row["method"], row["budget"]) for row in rows if row["error"] is not None}
    assert ("circuitpress", "1 bits") in failed and ("qtip", "") in failed
    assert all((row["kl"] is None) == (row["error"] is not None) for row in rows)


def test_the_judge_agrees_with_transformers(rows: list[dict[str, object]], tiny_llama: Path, text_file: Path) -> None:
    """KL and perplexity of the fake peer against two ordinary forward passes in float64."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = load_windows(text_file, tokenizer, length=24, samples=21, seed=0).ids[16:]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
    names = [matrix.module for block in read_anatomy(tiny_llama).blocks for matrix in block.matrices]
    with torch.no_grad():
        p = model(ids).logits.log_softmax(-1)
        for name in names:
            weight = model.get_submodule(name).weight
            weight.copy_((weight * 4).round() / 4)
        q = model(ids).logits.log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    loss = -q[:, :-1].gather(2, ids[:, 1:, None]).mean()
    plain, padded = only(rows, "fake")
    assert plain["kl"] == pytest.approx(kl, rel=1e-4)
    assert plain["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)
    assert padded["kl"] == pytest.approx(kl, rel=1e-4)  # the padding is cut off, and counted
    assert isinstance(padded["linear_bytes"], int) and isinstance(plain["linear_bytes"], int)


def test_bytes_are_those_of_the_files(rows: list[dict[str, object]], tiny_llama: Path) -> None:
    anatomy = read_anatomy(tiny_llama)
    for row in only(rows, "circuitpress")[:2] + only(rows, "fake"):
        assert row["bits_per_weight"] == pytest.approx(8 * row["linear_bytes"] / anatomy.linear_numel)  # type: ignore
    for row, budget in zip(only(rows, "circuitpress")[:2], (4.5, 6.0), strict=True):
        assert budget - 1 < row["bits_per_weight"] <= budget  # type: ignore[operator]
    (plain, _) = only(rows, "fake")
    assert plain["file_bytes"] == plain["linear_bytes"] + anatomy.other_bytes  # type: ignore[operator]


def test_more_bits_lose_less(rows: list[dict[str, object]]) -> None:
    small, large = only(rows, "circuitpress")[:2]
    assert large["kl"] < small["kl"]  # type: ignore[operator]
    fisher, random = (only(rows, f"control:{name}")[0]["kl"] for name in ("fisher", "random"))
    assert fisher < random  # type: ignore[operator]


def test_random_plans_fill_the_budget_and_no_more() -> None:
    nbytes = np.array([[10, 20, 30], [5, 9, 40], [7, 8, 9]])
    for seed in range(20):
        choice = random_choice(nbytes, 60, seed=seed)
        assert choice is not None
        left = 60 - int(nbytes[range(3), choice].sum())
        extra = nbytes - nbytes[range(3), choice][:, None]
        assert left >= 0 and not ((extra > 0) & (extra <= left)).any()
    assert random_choice(nbytes, 21, seed=0) is None
    assert random_choice(nbytes, 22, seed=0) is not None


def test_nearest_rounds_to_the_grid_of_each_group() -> None:
    weight = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    rounded = nearest(weight, IntFormat(3, 16))
    for start, stop in ((0, 16), (16, 20)):
        group, result = weight[:, start:stop].double().numpy(), rounded[:, start:stop].double().numpy()
        for row, found in zip(group, result, strict=True):
            step = float(np.float16((max(row.max(), 0) - min(row.min(), 0)) / 7))
            assert len(np.unique(found)) <= 8
            assert np.abs(found - row).max() <= step * 0.501 + 1e-6


def test_settings_are_real_and_unknown_peers_refused() -> None:
    chosen = settings(PEERS, (2, 3, 4))
    assert {setting.method for setting in chosen} == set(PEERS)
    home = Path(sys.modules["circuitpress.bench.methods"].__file__ or "").parent / "peers"
    assert all((home / f"{setting.adapter}.py").exists() for setting in chosen)
    assert len({(s.method, s.budget, tuple(s.options.items())) for s in chosen}) == len(chosen)
    with pytest.raises(CircuitpressError, match="awq: no such peer"):
        settings(["awq"], (4,))


def test_the_command_writes_json_and_picture(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=tiny_llama))
    arguments = f"bench quality {tiny_llama} --text {text_file} --test {text_file} --peers none --budget 5 --samples 9"
    arguments += f" --windows 2 --length 20 --recipe {recipe} --out {tmp_path / 'out'} --quiet"
    assert invoke(arguments.split()) == 0
    document = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert {row["text"] for row in document["rows"]} == {text_file.name}
    assert (tmp_path / "out" / "quality.svg").exists()
    assert load_file(tmp_path / "out" / "work" / tiny_llama.name / "calibration.safetensors")["ids"].shape == (9, 20)


def test_bad_options_are_named(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["bench", "quality", str(tiny_llama), "--bits", "2,x"]) == 2
    assert "--bits 2,x: expected numbers" in capsys.readouterr().err
