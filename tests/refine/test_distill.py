"""Refinement lowers the KL it was asked to lower, by what the written model really has, and never stores a worse one.

The weights and the text are random, so there is nothing to generalise to: the windows of the check are learned from.
"""

import shutil
from pathlib import Path

import pytest
import torch

from circuitpress.apply import apply
from circuitpress.behaviors import Behavior
from circuitpress.errors import CircuitpressError
from circuitpress.evaluate import fidelity
from circuitpress.price import price
from circuitpress.probe import uniform_plan
from circuitpress.refine import Hold, Rates, Refined, refine, write_refined
from circuitpress.score.ability import behavior_values
from circuitpress.stream import open_stream
from circuitpress.units import Plan

from ..score.test_metrics import contrasts, sentences
from ..whole import tokens

LEARN = tokens(12, 24, seed=1)
CHECK = LEARN[:4]


def packed(source: Path, work: Path, form: str) -> Path:
    """A model with every matrix in `form`."""
    stream = open_stream(source)
    _, prices = price(stream, LEARN, formats=[form], folder=work / "priced")
    decisions = tuple(uniform_plan(prices, form))
    numel, nbytes = sum(group.numel for group in prices.groups), sum(d.nbytes for d in decisions)
    plan = Plan("test", "native", decisions, nbytes, numel, 0, 0.0, None, 0.0)
    apply(stream, plan, LEARN, saliency=work / "priced", shards=work / "shards", out=work / "model")
    return work / "model"


def refined(source: Path, model: Path, *, steps: int = 30, rates: Rates | None = None, seed: int = 0) -> Refined:
    return refine(model, open_stream(source), LEARN, CHECK, steps=steps, batch_tokens=96, rates=rates, seed=seed)


def kl(source: Path, model: Path) -> float:
    return fidelity(open_stream(model), open_stream(source), CHECK).divergence.kl


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen2", "tiny_gpt2"])
def test_the_written_model_has_the_kl_that_was_promised(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(name)
    model = packed(source, tmp_path, "int2g16")
    sizes = {path.name: path.stat().st_size for path in model.glob("*.safetensors")}
    before = kl(source, model)
    result = refined(source, model, steps=60, rates=Rates(codes=0.05, scales=0.02, norms=0.01))
    assert result.kept
    assert result.kl_before == pytest.approx(before, rel=1e-4)
    assert result.kl_after < 0.8 * before
    write_refined(model, result.tensors, result.to_json())
    assert kl(source, model) == pytest.approx(result.kl_after, rel=1e-4)
    assert {path.name: path.stat().st_size for path in model.glob("*.safetensors")} == sizes


def test_equal_inputs_give_equal_tensors(tiny_llama: Path, tmp_path: Path) -> None:
    model = packed(tiny_llama, tmp_path, "int2g16")
    first, second, other = (refined(tiny_llama, model, steps=5, seed=seed) for seed in (0, 0, 1))
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())
    assert not all(torch.equal(tensor, other.tensors[name]) for name, tensor in first.tensors.items())


def test_a_worse_model_is_not_kept(tiny_llama: Path, tmp_path: Path) -> None:
    model = packed(tiny_llama, tmp_path, "int8g16")
    result = refined(tiny_llama, model, steps=3, rates=Rates(codes=40.0, scales=0.5, norms=0.5))
    assert result.kl_after > result.kl_before
    assert not result.kept
    assert not result.tensors


@pytest.mark.parametrize("behavior", [contrasts(), sentences()], ids=["contrasts", "sentences"])
def test_a_margin_that_is_held_does_not_fall(behavior: Behavior, tiny_llama: Path, tmp_path: Path) -> None:
    """Two more than what refinement leaves of them, for pairs that the model decides either way."""
    model, stream = packed(tiny_llama, tmp_path, "int2g16"), open_stream(tiny_llama)
    dense = torch.from_numpy(behavior_values(stream, behavior)[1]).float()

    def refined_margin(aim: float, rate: float) -> float:
        holds = [Hold(behavior, dense, aim, rate)]
        result = refine(
            model, stream, LEARN, CHECK, steps=40, batch_tokens=96, rates=Rates(0.05, 0.02, 0.01), holds=holds
        )
        assert result.kept
        copy = Path(shutil.copytree(model, tmp_path / f"held-{rate}"))
        write_refined(copy, result.tensors, result.to_json())
        return float(behavior_values(open_stream(copy), behavior)[1].mean())

    free = refined_margin(0.0, 0.0)
    held, same = refined_margin(free + 2.0, 0.02), refined_margin(free - 20.0, 0.01)
    assert held > free + 1.7
    # What is not below its aim does not count.
    assert same == free


def test_a_model_without_packed_weights_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    model = packed(tiny_llama, tmp_path, "float32")
    with pytest.raises(CircuitpressError, match="has no packed weights"):
        refined(tiny_llama, model)
