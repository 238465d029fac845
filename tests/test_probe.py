"""Probes and single changes against whole models, against applied models, and against each other."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from circuitpress.apply import apply
from circuitpress.evaluate import fidelity
from circuitpress.hooks import weight_of
from circuitpress.price import price
from circuitpress.probe import choose_singles, exact, plan_edits, probe, uniform_plan
from circuitpress.segments import Granularity
from circuitpress.stream import open_stream
from circuitpress.units import Decision, Group, Plan, Prices, Probe

from .recorder import NeuronOrder, Recorder
from .whole import divergence, linears, load, tokens, weight

CALIBRATION, HELD_OUT = tokens(4, 8), tokens(3, 9, seed=1)


def make_plan(prices: Prices, decisions: tuple[Decision, ...]) -> Plan:
    order = {layer: tuple(order.tolist()) for layer, order in prices.neuron_order.items()}
    size = sum(decision.nbytes for decision in decisions)
    return Plan("test", "native", decisions, size, int(prices.numel.sum()), 0, 0.0, None, 0.0, neuron_order=order)


@pytest.mark.parametrize("granularity", ["matrix", "unit"])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_a_uniform_probe_is_the_fidelity_of_the_applied_model(
    name: str, granularity: Granularity, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    stream = open_stream(folder, batch_tokens=16)
    formats = ["int2g16", "int4g16"]
    _, prices = price(
        stream, CALIBRATION, formats=formats, granularity=granularity, neuron_block=16, folder=tmp_path / "priced"
    )

    def measure(*forms: str) -> list[Probe]:
        saliency = tmp_path / "priced"
        return probe(
            stream, calibration=CALIBRATION, held_out=HELD_OUT, prices=prices, saliency=saliency, formats=forms
        )

    together = measure(*formats)
    assert [p.label for p in together] == ["uniform int2g16", "uniform int4g16"]
    for f, form in enumerate(formats):
        (found,) = measure(form)
        plan = make_plan(prices, uniform_plan(prices, form))
        out = tmp_path / form
        apply(stream, plan, CALIBRATION, saliency=tmp_path / "priced", shards=tmp_path / "shards", out=out)
        measured = fidelity(open_stream(out), open_stream(folder), HELD_OUT)
        # The same weights; neurons in another order of summation, micro-batches of another size.
        assert found.measured_kl == pytest.approx(measured.divergence.kl, rel=1e-5)
        assert together[f].bits_per_weight == found.bits_per_weight
        assert found.bits_per_weight == pytest.approx(measured.bits_per_weight, rel=1e-12)
        assert found.predicted_kl == pytest.approx(float(prices.nats[:, f].sum()), rel=1e-12)
    assert together[0].measured_kl > 2 * together[1].measured_kl > 0.01


@pytest.mark.parametrize("granularity", ["matrix", "unit"])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_plans_of_one_pass_are_those_of_one_by_one(
    name: str, granularity: Granularity, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Products of a shared pass differ in the last bit: a scale may become the next float16, and no code another."""
    stream = open_stream(request.getfixturevalue(name), batch_tokens=16)
    formats = ["int2g16", "int4g16"]
    _, prices = price(stream, CALIBRATION, formats=formats, granularity=granularity, neuron_block=16, folder=tmp_path)

    def weights(*forms: str) -> dict[tuple[str, int, str], Tensor]:
        plans = {form: uniform_plan(prices, form) for form in forms}
        edits = plan_edits(stream, plans, calibration=CALIBRATION, saliency=tmp_path, orders=prices.neuron_order)
        found: dict[tuple[str, int, str], Tensor] = {}
        for place in stream.anatomy.blocks:
            with stream.block(place.index) as module:
                for form, edit in edits(place.index, module, lambda _: torch.empty(0)).items():
                    with edit():
                        for matrix in place.matrices:
                            found[form, place.index, matrix.module] = weight_of(module, place, matrix).clone()
        return found

    together, alone = weights(*formats), weights("int2g16") | weights("int4g16")
    assert together.keys() == alone.keys()
    for key, weight_alone in alone.items():
        torch.testing.assert_close(together[key], weight_alone, rtol=2**-10, atol=0)


@pytest.mark.parametrize("granularity", ["matrix", "unit"])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_single_changes_are_those_of_a_whole_model(
    name: str, granularity: Granularity, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the group's rows or columns are taken from the rounded matrix, edited into the whole model by hand."""
    folder = request.getfixturevalue(name)
    recorder = Recorder()
    recorder.install(monkeypatch)
    stream = open_stream(folder, batch_tokens=16)
    _, prices = price(
        stream, CALIBRATION, formats=["int2g16", "int3g64"], granularity=granularity, neuron_block=20, folder=tmp_path
    )
    singles = [(i, form) for i in range(0, len(prices.groups), 5) for form in ("int2g16", "int3g64")]
    result = exact(
        stream, calibration=CALIBRATION, held_out=HELD_OUT, prices=prices, saliency=tmp_path, singles=singles
    )
    model = load(folder)
    with torch.no_grad():
        clean = model(HELD_OUT).logits
    for (i, form), row in zip(singles, result["rows"], strict=True):
        (segment,) = prices.groups[i].segments
        dense = weight(linears(model)[segment.module])
        old, order = dense.clone(), NeuronOrder(prices, prices.groups[i].layer, segment.module)
        changed = order.apply(dense).clone()
        _, decoded = recorder.find(changed)
        span = slice(segment.start, segment.stop)
        index = (span, slice(None)) if segment.axis == "rows" else (slice(None), span)
        changed[index] = decoded[form][index]
        dense.copy_(order.undo(changed))
        with torch.no_grad():
            kl = float(divergence(clean, model(HELD_OUT).logits).mean())
        dense.copy_(old)
        assert row["exact_kl"] == pytest.approx(kl, rel=2e-3, abs=2e-6), (segment, form)
        assert row["price"] == prices.nats[i, prices.column(form)]
        assert (row["group"], row["format"]) == (prices.groups[i].name, form)
    check_summary(result)


def check_summary(result: dict) -> None:
    """Spearman by counting ranks, median by sorting."""
    pairs = [(row["price"], row["exact_kl"]) for row in result["rows"]]
    ranks = [[sorted(values).index(v) for v in values] for values in zip(*pairs, strict=True)]
    n = len(pairs)
    difference = sum((a - b) ** 2 for a, b in zip(*ranks, strict=True))
    assert result["spearman"] == pytest.approx(1 - 6 * difference / (n * (n * n - 1)))
    ratios = sorted(kl / value for value, kl in pairs)
    middle = (ratios[(n - 1) // 2] + ratios[n // 2]) / 2
    assert result["median_ratio"] == pytest.approx(middle)


def test_too_few_singles_have_no_correlation(tiny_llama: Path, tmp_path: Path) -> None:
    stream = open_stream(tiny_llama)
    _, prices = price(stream, CALIBRATION, formats=["int4g16"], folder=tmp_path)
    singles = [(0, "int4g16"), (9, "int4g16")]
    result = exact(
        stream, calibration=CALIBRATION, held_out=HELD_OUT, prices=prices, saliency=tmp_path, singles=singles
    )
    assert np.isnan(result["spearman"])
    assert np.isnan(result["median_ratio"])
    assert [row["group"] for row in result["rows"]] == [prices.groups[0].name, prices.groups[9].name]


def some_prices(nats: np.ndarray) -> Prices:
    groups = tuple(Group(f"g{i}", 0, ()) for i in range(len(nats)))
    return Prices(groups, ("a", "b"), np.ones(nats.shape, np.int64), nats, nats, nats)


def test_singles_are_the_dearest_and_a_random_half() -> None:
    nats = np.arange(1.0, 41.0).reshape(20, 2)
    singles = choose_singles(some_prices(nats), ["b", "a"], 0.25, seed=3)
    assert len(singles) == len(set(singles)) == 10
    values = sorted((float(nats[i, {"a": 0, "b": 1}[form]]) for i, form in singles), reverse=True)
    assert values[:5] == [40, 39, 38, 37, 36]
    assert singles == choose_singles(some_prices(nats), ["b", "a"], 0.25, seed=3)
    others = {tuple(choose_singles(some_prices(nats), ["b", "a"], 0.25, seed=seed)) for seed in range(6)}
    assert len(others) > 3
    assert len(choose_singles(some_prices(nats), ["a"], 1.0)) == 20
    assert choose_singles(some_prices(nats), ["a"], 0.0) == []


def test_a_price_of_zero_is_not_checked() -> None:
    """The checkpoint's own type changes nothing: KL over price would be 0 / 0."""
    nats = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    assert choose_singles(some_prices(nats), ["a", "b"], 1.0) == [(0, "a"), (1, "a"), (2, "a")]
