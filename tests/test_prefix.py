"""Rounding behind the rounded prefix, against the same steps done on whole models in transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from circuitpress.apply import apply
from circuitpress.evaluate import fidelity
from circuitpress.prefix import SHARE
from circuitpress.price import load_saliency, price
from circuitpress.probe import probe
from circuitpress.quantize import quantize_matrix
from circuitpress.rounding import segments_by_module
from circuitpress.segments import Granularity
from circuitpress.stream import open_stream
from circuitpress.units import Plan

from .test_apply import contents, dense_twin, plan_of
from .whole import linears, load, tokens, weight

FORMATS = ("int2g16", "int4g16", "float32")
ORDER = ("q_proj", "k_proj", "v_proj", "c_attn", "o_proj", "attn.c_proj")
ORDER += ("gate_proj", "up_proj", "c_fc", "down_proj", "mlp.c_proj")
DAMPING = 0.01


def write(
    folder: Path, work: Path, *, granularity: Granularity = "matrix", batch_tokens: int = 4096, correct: bool = True
) -> tuple[Path, Plan]:
    """Applies a plan of all formats; every third matrix stays as it is."""
    ids = tokens(6, 15)
    stream = open_stream(folder, batch_tokens=batch_tokens)
    _, prices = price(
        stream, ids, formats=FORMATS, granularity=granularity, neuron_block=20, folder=work / "priced"
    )  # fmt: skip
    plan = plan_of(prices, lambda i: (1, 0, 2)[i % 3])
    apply(
        stream, plan, ids, saliency=work / "priced", shards=work / "shards", out=work / "model", correct=correct
    )  # fmt: skip
    return work / "model", plan


def inputs_of(model: Any, name: str, ids: Tensor) -> Tensor:
    """What one linear map reads, [tokens, columns]."""
    seen: list[Tensor] = []
    handle = linears(model)[name].register_forward_hook(lambda _m, args, _y: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_every_matrix_is_rounded_for_the_inputs_that_it_will_see(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Each in turn: target and Hessian from two models in float64, of which one has all earlier matrices rounded."""
    folder = request.getfixturevalue(name)
    out, plan = write(folder, tmp_path, batch_tokens=30)
    ids = tokens(6, 15)
    original, compressed, written = load(folder), load(folder), linears(dense_twin(folder, out))
    layout = segments_by_module(plan.decisions)
    names = [n for i in range(3) for end in ORDER for n in linears(original) if f".{i}." in n and n.endswith(end)]
    assert len(names) == len(layout)
    same = total = 0
    better: list[float] = []
    for matrix in names:
        x, y = inputs_of(original, matrix, ids), inputs_of(compressed, matrix, ids)
        block = next(i for i in range(3) if f".{i}." in matrix)
        s = load_saliency(tmp_path / "priced", block, matrix).double().flatten()[:, None] / len(x)
        hessian, drift = (s * y).T @ y, (s * (x - y)).T @ y
        damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
        dense = weight(linears(original)[matrix])
        target = dense + SHARE * dense @ torch.linalg.solve(damped, drift.T).T
        axis, segments = layout[matrix]
        found = weight(written[matrix]).double()
        if segments[0][0] == "float32":
            torch.testing.assert_close(found, dense)
        else:
            expected = quantize_matrix(target.float(), hessian.float(), axis, segments).decode().double()  # pyright: ignore
            plain = quantize_matrix(dense.float(), hessian.float(), axis, segments).decode().double()  # pyright: ignore
            same += int(((found - expected).abs() < 1e-3 * dense.abs().max()).sum())
            total += found.numel()
            errors = [float((s * (x @ dense.T - y @ w.T).square()).sum()) for w in (found, plain)]
            better.append(errors[0] / errors[1])
        # Later matrices see what was written, so that a code that falls the other way is not counted again and again.
        weight(linears(compressed)[matrix]).copy_(found)
    assert same > 0.97 * total  # float32 and float64 moments part at ties
    assert sum(better) / len(better) < 0.97


@pytest.mark.parametrize(("name", "granularity"), [("tiny_llama", "unit"), ("tiny_gpt2", "matrix")])
def test_a_resumed_run_gives_the_same_bytes(
    name: str, granularity: Granularity, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Blocks that are done are carried through as they were written, neurons in another order or not."""
    folder = request.getfixturevalue(name)
    out, plan = write(folder, tmp_path, granularity=granularity)
    before = contents(out)
    (shards,) = (tmp_path / "shards").iterdir()
    for block in (1, 2):
        (shards / f"block-{block:05d}.safetensors").unlink()
    apply(
        open_stream(folder), plan, tokens(6, 15), saliency=tmp_path / "priced", shards=tmp_path / "shards", out=out,
        correct=True,
    )  # fmt: skip
    assert contents(out) == before


def test_probes_measure_the_model_that_will_be_written(tiny_llama: Path, tmp_path: Path) -> None:
    out, plan = write(tiny_llama, tmp_path)
    ids, held_out, stream = tokens(6, 15), tokens(4, 15, seed=1), open_stream(tiny_llama)
    prices = price(stream, ids, formats=FORMATS, folder=tmp_path / "priced")[1]
    found = {
        correct: probe(
            stream, calibration=ids, held_out=held_out, prices=prices, saliency=tmp_path / "priced", formats=[],
            plans={"plan": plan.decisions}, correct=correct,
        )[0].measured_kl
        for correct in (True, False)
    }  # fmt: skip
    kl = fidelity(open_stream(out), stream, held_out).divergence.kl
    assert found[True] == pytest.approx(kl, rel=1e-3)
    assert found[False] != pytest.approx(kl, rel=1e-2)


def test_hessians_beside_join_those_behind_the_prefix(tiny_llama: Path, tmp_path: Path) -> None:
    """Of the same text and with all the weight they leave no correction: what is written is what is without it."""
    plain, plan = write(tiny_llama, tmp_path / "plain", correct=False)
    priced = tmp_path / "plain" / "priced"
    apply(
        open_stream(tiny_llama), plan, tokens(6, 15), saliency=priced, shards=tmp_path / "shards",
        out=tmp_path / "beside", correct=True, beside=[(priced, 1e6)],
    )  # fmt: skip
    found, expected = (linears(dense_twin(tiny_llama, out)) for out in (tmp_path / "beside", plain))
    same = [(weight(found[name]) == weight(expected[name])).float().mean() for name in expected]
    assert sum(same) / len(same) > 0.98


def test_without_it_other_codes_are_written(tiny_llama: Path, tmp_path: Path) -> None:
    """The first matrices see what the original does, and are the same; later ones are not."""
    found = [
        linears(dense_twin(tiny_llama, write(tiny_llama, tmp_path / str(correct), correct=correct)[0]))
        for correct in (True, False)
    ]
    first, last = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.gate_proj"
    assert (weight(found[0][first]) == weight(found[1][first])).float().mean() > 0.99
    assert (weight(found[0][last]) != weight(found[1][last])).any()
