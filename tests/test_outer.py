"""Embedding and lm_head against the whole model: prices by autograd, rounding, and the model that is written."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from circuitpress.apply import apply
from circuitpress.evaluate import fidelity
from circuitpress.outer import load_hessian, load_outer, outer_path, round_outer
from circuitpress.plan import make_plan
from circuitpress.price import price
from circuitpress.probe import outer_edits, plan_edits
from circuitpress.score.variants import measure
from circuitpress.stream import open_stream
from circuitpress.units import OUTER, Plan, Prices

from .whole import divergence, draw_labels, load, tokens

FORMATS = ["int3g16", "int4g64", "int8g20"]
WINDOWS = tokens(5, 7)
NAMES = ("tiny_llama", "tiny_mistral", "tiny_qwen2", "tiny_gpt2")


@pytest.fixture(params=NAMES)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def priced(folder: Path, where: Path, **options: Any) -> tuple[Any, Prices, Prices]:
    stream = open_stream(folder, dtype="float32", batch_tokens=14)
    _, prices = price(stream, WINDOWS, formats=["int4g16"], outer=FORMATS, folder=where, **options)
    outer = load_outer(stream.anatomy, where)
    assert outer is not None
    return stream, prices, outer


def ends(model: Any) -> tuple[nn.Module, nn.Module]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def statistics(model: Any, ids: Tensor, draw: int) -> tuple[Tensor, Tensor, Tensor]:
    """(g at the embedding's output, probabilities, g at the logits) of drawn labels, by autograd in float64."""
    kept: dict[str, Tensor] = {}

    def keep(_: nn.Module, __: object, output: Tensor) -> None:
        output.requires_grad_(True)
        output.retain_grad()
        kept["out"] = output

    handle = ends(model)[0].register_forward_hook(keep)
    logits = model(ids).logits
    handle.remove()
    logits.retain_grad()
    labels = draw_labels(logits.detach(), draw=draw)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    g, at_logits = kept["out"].grad, logits.grad
    assert g is not None
    assert at_logits is not None
    return g, logits.detach().softmax(-1), at_logits


def head_input(model: Any, ids: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = ends(model)[1].register_forward_hook(lambda _, args, __: seen.append(args[0].detach()))
    model(ids)
    handle.remove()
    return seen[0]


def unpolished(weight: Tensor, hessian: Tensor, form: str) -> Tensor:
    """The weights that are priced."""
    return round_outer(weight, hessian, form, polish=False).decode()


@pytest.mark.parametrize("draws", [1, 2])
def test_prices_are_those_of_the_whole_model(folder: Path, draws: int, tmp_path: Path) -> None:
    stream, _, outer = priced(folder, tmp_path, draws=draws)
    model = load(folder)
    embedding, head = ends(model)
    x = head_input(model, WINDOWS)
    for group, row, sequence in zip(outer.groups, outer.nats, outer.nats_sequence, strict=True):
        acts = {end for end, module in (("in", embedding), ("out", head)) if module is model.get_submodule(group.name)}
        acts |= {"in", "out"} if len(outer.groups) == 1 else set()
        weight = stream.outer_weight(group.name)
        for f, form in enumerate(FORMATS):
            change = (unpolished(weight, load_hessian(tmp_path, group.name), form) - weight).double()
            token, whole = [], []
            for draw in range(draws):
                g, p, at_logits = statistics(model, WINDOWS, draw)
                d = x @ change.T
                a = (g * change[WINDOWS]).sum(-1) if "in" in acts else torch.zeros(WINDOWS.shape).double()
                b = (at_logits * d).sum(-1) if "out" in acts else torch.zeros_like(a)
                mean = (p * d).sum(-1, keepdim=True)
                variance = (p * (d - mean) ** 2).sum(-1) if "out" in acts else torch.zeros_like(a)
                token.append(0.5 * (a**2 + 2 * a * b + variance).mean())
                sums = a.sum(1) ** 2 + 2 * a.sum(1) * b.sum(1) + variance.sum(1)
                whole.append(0.5 * sums.mean() / WINDOWS.shape[1])
            assert row[f] == pytest.approx(float(torch.stack(token).mean()), rel=2e-3, abs=1e-9), (group.name, form)
            assert sequence[f] == pytest.approx(float(torch.stack(whole).mean()), rel=2e-3, abs=1e-9)


def test_the_variance_is_the_mean_over_labels(tiny_llama: Path, tmp_path: Path) -> None:
    """1/2 E (g . d)^2 with the label summed over by hand is the price of lm_head."""
    stream, _, outer = priced(tiny_llama, tmp_path)
    model = load(tiny_llama)
    x, p = head_input(model, WINDOWS), model(WINDOWS).logits.detach().softmax(-1)
    weight = stream.outer_weight("lm_head")
    change = (unpolished(weight, load_hessian(tmp_path, "lm_head"), "int3g16") - weight).double()
    d = x @ change.T
    expected = 0.0
    for label in range(p.shape[-1]):
        onehot = torch.zeros(p.shape[-1], dtype=torch.float64)
        onehot[label] = 1
        expected += float((p[..., label] * (((p - onehot) * d).sum(-1)) ** 2).mean()) / 2
    assert outer.nats[1, 0] == pytest.approx(expected, rel=1e-4)


def test_hessians_are_second_moments(folder: Path, tmp_path: Path) -> None:
    priced(folder, tmp_path)
    model = load(folder)
    g, p, _ = statistics(model, WINDOWS, 0)
    g, x = g.flatten(0, 1), head_input(model, WINDOWS).flatten(0, 1)
    vocab = p.shape[-1]
    s = (p * (1 - p)).mean(-1).flatten()
    inside, out = g.T @ g / len(g) / vocab, (x * s[:, None]).T @ x / len(x)
    names = [group.name for group in load_outer(open_stream(folder).anatomy, tmp_path).groups]  # pyright: ignore
    expected = {names[0]: inside, names[1]: out} if len(names) == 2 else {names[0]: inside + out}
    for name, hessian in expected.items():
        found = load_hessian(tmp_path, name).double()
        assert float((found - hessian).norm() / hessian.norm()) < 1e-3


def test_stripes_round_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(53, 40, generator=torch.Generator().manual_seed(0))
    hessian = torch.eye(40) + 0.3
    whole = round_outer(weight, hessian, "int4g20")
    monkeypatch.setattr("circuitpress.outer._STRIPE", 16)
    striped = round_outer(weight, hessian, "int4g20")
    assert [part[1:3] for part in striped.parts] == [(0, 16), (16, 32), (32, 48), (48, 53)]
    # Polishing sums over rows that are still at work, in another order: a near tie may fall the other way.
    assert (whole.decode() != striped.decode()).float().mean() < 0.01


def test_one_price_a_run(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that is there is not made again; without formats none is made."""
    stream, _, outer = priced(tiny_llama, tmp_path)
    before = outer_path(tmp_path).read_bytes()
    monkeypatch.setattr("circuitpress.price.price_outer", lambda *_, **__: pytest.fail("priced again"))
    price(stream, WINDOWS, formats=["int4g16"], outer=FORMATS, folder=tmp_path)
    assert outer_path(tmp_path).read_bytes() == before
    other = tmp_path / "other"
    price(stream, WINDOWS, formats=["int4g16"], folder=other)
    assert load_outer(stream.anatomy, other) is None
    assert outer.nbytes.shape == outer.nats.shape == (2, 3)
    assert (outer.stderr > 0).all()


def test_few_tokens_price_a_large_vocabulary(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("circuitpress.outer.MOST_TOKENS", 20)
    _, _, few = priced(tiny_llama, tmp_path / "few")
    stream = open_stream(tiny_llama, dtype="float32", batch_tokens=14)
    price(stream, WINDOWS[:2], formats=["int4g16"], outer=FORMATS, folder=tmp_path / "first")
    first = load_outer(stream.anatomy, tmp_path / "first")
    assert first is not None
    np.testing.assert_allclose(few.nats, first.nats, rtol=1e-6)


def written(folder: Path, where: Path, form: str) -> tuple[Path, Plan]:
    stream, prices, outer = priced(folder, where / "priced")
    plan = make_plan(prices, budget="16bpw", other_bytes=0, outer=outer, outer_format=form)
    out = where / "model"
    apply(stream, plan, WINDOWS, saliency=where / "priced", shards=where / "shards", out=out)
    return out, plan


@pytest.mark.parametrize("form", FORMATS)
def test_the_written_model_computes_with_the_rounded_matrices(folder: Path, form: str, tmp_path: Path) -> None:
    out, plan = written(folder, tmp_path, form)
    stream = open_stream(folder, dtype="float32")
    expected = {
        decision.group.name: round_outer(
            stream.outer_weight(decision.group.name),
            load_hessian(tmp_path / "priced", decision.group.name),
            decision.format,
        ).decode()
        for decision in plan.outer
    }
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    packed = open_stream(out, dtype="float32")
    twin = load(folder, torch.float32)
    with torch.no_grad():
        for name, weight in expected.items():
            assert torch.equal(packed.outer_weight(name), weight)
            probe = torch.eye(weight.shape[1]) if name == "lm_head" else torch.arange(97)
            assert torch.equal(model.get_submodule(name)(probe), weight.T if name == "lm_head" else weight)
            twin.get_submodule(name).weight.copy_(weight)
        for block in packed.anatomy.blocks:
            for matrix in block.matrices:
                decoded = packed._weights.decode(matrix.module)
                twin.get_submodule(matrix.module).weight.copy_(decoded.T if matrix.transposed else decoded)
        wanted = twin(WINDOWS).logits
        found = model(WINDOWS).logits
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    # Fidelity streams the packed model, and counts all of its bytes.
    result = fidelity(packed, open_stream(folder, dtype="float32"), WINDOWS)
    clean = load(folder, torch.float32)(WINDOWS).logits.detach()
    assert result.divergence.kl == pytest.approx(float(divergence(clean, wanted).mean()), rel=1e-3)
    assert result.bytes == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert result.linear_bytes == plan.linear_bytes
    stored = load_file(min(out.glob("*.safetensors")))
    sizes = {name: sum(t.nbytes for key, t in stored.items() if key.startswith(f"{name}.")) for name in expected}
    assert sizes == {decision.group.name: decision.nbytes for decision in plan.outer}


def test_variants_measure_what_is_written(folder: Path, tmp_path: Path) -> None:
    out, plan = written(folder, tmp_path, "int3g16")
    stream, held_out = open_stream(folder, dtype="float32", batch_tokens=14), tokens(3, 9, seed=1)
    plans = {"plan": (*plan.decisions, *plan.outer), "blocks": plan.decisions}
    saliency = tmp_path / "priced"
    edits = plan_edits(stream, plans, calibration=WINDOWS, saliency=saliency, orders={})
    outer = outer_edits(stream, plans, saliency=saliency)
    assert set(outer) == {"plan"}
    found = measure(stream, held_out, edits, outer=outer, context=WINDOWS)
    result = fidelity(open_stream(out, dtype="float32"), stream, held_out)
    assert found["plan"].kl == pytest.approx(result.divergence.kl, rel=1e-4)
    assert found["plan"].kl > 1.2 * found["blocks"].kl
    assert all(decision.group.layer == OUTER for decision in plan.outer)
    # Nothing of it is left in the model.
    again = measure(stream, held_out, edits, context=WINDOWS)
    assert again["blocks"].kl == found["blocks"].kl


def test_a_packed_embedding_alone_keeps_other_programs_out(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Blocks dense, only the tied matrix packed: transformers without circuitpress must raise."""
    stream, prices, outer = priced(tiny_qwen2, tmp_path / "priced")
    nbytes, nothing = 4 * prices.numel[:, None], np.zeros((len(prices.groups), 1))
    dense = Prices(prices.groups, ("float32",), nbytes, nothing, nothing, nothing)
    plan = make_plan(dense, budget="32bpw", other_bytes=0, outer=outer, outer_format="int4g64")
    out = tmp_path / "model"
    apply(stream, plan, WINDOWS, saliency=tmp_path / "priced", shards=tmp_path / "shards", out=out)
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        "try:\n    AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "except Exception as error:\n    sys.exit(f'raised {error}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "raised" in done.stderr
    shutil.rmtree(out)
