"""Prices, scores and Hessians against a float64 brute force through the whole model; resuming; bytes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import circuitpress.price as pricing
from circuitpress.console import ignore
from circuitpress.price import collect, load_hessians, load_saliency, price, shard_path
from circuitpress.segments import Granularity
from circuitpress.stream import open_stream
from circuitpress.units import Prices, Scores

from .recorder import NeuronOrder, Recorder
from .whole import draw_labels, linears, load, tokens, trace, weight

FORMATS = ("int2g16", "int3g64", "int8g32", "float32")
# float32 in the engine against float64 (float32 in norms) in the reference: products of some hundred terms each good to
# 1e-6, squared.
CLOSE = 1e-4


@dataclass
class Brute:
    """Per-window prices [windows, groups, formats] in float64."""

    token: NDArray[np.float64]
    sequence: NDArray[np.float64]


def brute_force(
    model: Any, ids: Tensor, prices: Prices, recorder: Recorder, *, draws: int, seed: int,
    positions: Tensor | None = None,
) -> Brute:  # fmt: skip
    """1/2 mean_t (g_t . dY_t)^2 and 1/(2 T) (sum_t g_t . dY_t)^2 of every group, with loops and the whole model.

    With `positions` only losses there count, and the mean is over them.
    """
    with torch.no_grad():
        logits = model(ids).logits
    windows, length = ids.shape
    shape = (windows, len(prices.groups), len(prices.formats))
    result = Brute(np.zeros(shape), np.zeros(shape))
    for draw in range(draws):
        labels = draw_labels(logits, seed=seed, draw=draw)
        whole = trace(model, ids, labels if positions is None else labels.where(positions, -100))
        for i, group in enumerate(prices.groups):
            (segment,) = group.segments
            dense = weight(linears(model)[segment.module])
            order = NeuronOrder(prices, group.layer, segment.module)
            _, decoded = recorder.find(order.apply(dense))
            x, g = whole.x[segment.module].double(), whole.g[segment.module].double()
            for f, form in enumerate(prices.formats):
                change = decoded[form] - order.apply(dense).double()
                only = torch.zeros_like(change)
                span = slice(segment.start, segment.stop)
                index = (span, slice(None)) if segment.axis == "rows" else (slice(None), span)
                only[index] = change[index]
                moved = order.undo(only)
                effect = torch.einsum("nti,oi,nto->nt", x, moved, g).numpy()
                result.token[:, i, f] += 0.5 * (effect**2).mean(1) / draws
                result.sequence[:, i, f] += 0.5 * effect.sum(1) ** 2 / length / draws
    scale = 1.0 if positions is None else positions.numel() / int(positions.sum())
    return Brute(result.token * scale, result.sequence * scale)


def assert_close(value: NDArray[Any], expected: NDArray[Any], *, rtol: float = CLOSE) -> None:
    """Relative where a price is large; below a billionth of the largest it is float32 noise about zero."""
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=1e-9 * float(np.abs(expected).max()))


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("granularity", ["matrix", "unit"])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_prices_are_those_of_the_formula(
    name: str, granularity: Granularity, draws: int, tmp_path: Path, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = request.getfixturevalue(name)
    recorder = Recorder()
    recorder.install(monkeypatch)
    ids = tokens(5, 9)
    stream = open_stream(folder, batch_tokens=18)
    scores, prices = price(
        stream, ids, formats=FORMATS, granularity=granularity, draws=draws, seed=2, neuron_block=20, folder=tmp_path
    )
    model = load(folder)
    brute = brute_force(model, ids, prices, recorder, draws=draws, seed=2)
    assert_close(prices.nats, brute.token.mean(0))
    assert_close(prices.nats_sequence, brute.sequence.mean(0))
    # Standard error of the mean over five windows, by its definition.
    deviation = brute.token - brute.token.mean(0)
    assert_close(prices.stderr, np.sqrt((deviation**2).sum(0) / 4 / 5))
    assert (prices.nats[:, 3] == 0).all()  # float32 is what the checkpoint holds: exactly nothing changes
    assert (prices.nats[:, 0] > prices.nats[:, 2]).all()
    check_scores(model, ids, scores, draws=draws)
    if granularity == "unit":
        check_order(scores, prices)
    else:
        assert prices.neuron_order == {}


@pytest.mark.parametrize("room", [pricing.KEPT_FLOWS, 0], ids=["kept", "pulled again"])
def test_changes_are_priced_on_whole_micro_batches_up_to_a_limit(
    room: int, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hessians and scores of units take all tokens."""
    monkeypatch.setattr(pricing, "PRICED_TOKENS", 26)
    monkeypatch.setattr(pricing, "KEPT_FLOWS", room)
    recorder = Recorder()
    recorder.install(monkeypatch)
    ids = tokens(5, 9)
    scores, prices = price(open_stream(tiny_llama, batch_tokens=18), ids, formats=FORMATS, seed=2, folder=tmp_path)
    model = load(tiny_llama)
    brute = brute_force(model, ids, prices, recorder, draws=1, seed=2)
    assert_close(prices.nats, brute.token[:2].mean(0))
    assert_close(prices.nats_sequence, brute.sequence[:2].mean(0))
    check_scores(model, ids, scores, draws=1)


def check_scores(model: Any, ids: Tensor, scores: Scores, *, draws: int) -> None:
    """1/2 mean_t (g_t . dY_t)^2 for closing single units of block 1, their spread, and the order of the units."""
    with torch.no_grad():
        logits = model(ids).logits
    wholes = [trace(model, ids, draw_labels(logits, seed=2, draw=draw)) for draw in range(draws)]
    sites = {name: module for name, module in linears(model).items() if ".1." in name}
    o = next(name for name in sites if name.endswith(("o_proj", "attn.c_proj")))
    down = next(name for name in sites if name.endswith(("down_proj", "mlp.c_proj")))
    share = {"self_attn": 2}.get(o.split(".")[-2], 1)
    cases = {"head.2": (o, slice(16, 24)), "kv_group.1": (o, slice(8 * share, 16 * share))}
    cases |= {"neuron.0": (down, slice(0, 1)), "neuron.51": (down, slice(51, 52))}
    for unit, (name, span) in cases.items():
        change = torch.zeros_like(weight(sites[name])).double()
        change[:, span] = -weight(sites[name])[:, span]
        windows = np.zeros(len(ids))
        for whole in wholes:
            effect = torch.einsum("nti,oi,nto->nt", whole.x[name].double(), change, whole.g[name].double()).numpy()
            windows += 0.5 * (effect**2).mean(1) / draws
        n = [str(u) for u in scores.units].index(f"L1.{unit}")
        assert_close(scores.values[n : n + 1], windows.mean(keepdims=True))
        assert_close(scores.stderr[n : n + 1], windows.std(ddof=1, keepdims=True) / np.sqrt(len(ids)))
    kinds = [(unit.layer, unit.kind) for unit in scores.units]
    assert len(set(scores.units)) == len(kinds) == len(scores.values)


def check_order(scores: Scores, prices: Prices) -> None:
    """Neurons stand in the order of their scores, the most important first."""
    for layer, order in prices.neuron_order.items():
        values = np.array(
            [
                v
                for unit, v in zip(scores.units, scores.values, strict=True)
                if (unit.layer, unit.kind) == (layer, "neuron")
            ]
        )
        assert sorted(order) == list(range(len(values)))
        assert (np.diff(values[order]) <= 0).all()
    assert sorted(prices.neuron_order) == [0, 1, 2]


def test_the_hessian_is_that_of_the_formula(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """H = mean_t s_t x_t x_t^T with s_t the mean of g^2 over the outputs, averaged over draws; s is kept in the
    shards."""
    recorder = Recorder()
    recorder.install(monkeypatch)
    ids = tokens(3, 8)
    price(open_stream(tiny_llama, batch_tokens=16), ids, formats=["int4g16"], draws=2, seed=0, folder=tmp_path)
    model = load(tiny_llama)
    with torch.no_grad():
        logits = model(ids).logits
    wholes = [trace(model, ids, draw_labels(logits, draw=draw)) for draw in range(2)]
    for name, module in linears(model).items():
        hessian, _ = recorder.find(weight(module))
        s = sum(whole.g[name].double().square().mean(-1) for whole in wholes) / 2
        assert isinstance(s, Tensor)
        x = wholes[0].x[name].double()
        expected = torch.einsum("nt,nti,ntj->ij", s, x, x) / ids.numel()
        assert float((hessian - expected).abs().max()) < CLOSE * float(expected.abs().max())
        kept = load_saliency(tmp_path, int(name.split(".")[2]), name)
        # The first token attends to itself alone: no query or key gradient there but float noise.
        torch.testing.assert_close(kept.double(), s, rtol=CLOSE, atol=1e-9 * float(s.max()))


@pytest.mark.parametrize("room", [0, pricing.KEPT_INPUTS])
def test_half_of_many_tokens_have_gradients(
    tiny_llama: Path, tmp_path: Path, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others weigh what these do at their position in the mean; scores and prices are those of the first half.
    Whether what the others read is kept or computed again makes no difference."""
    monkeypatch.setattr(pricing, "GRADED_TOKENS", 20)
    monkeypatch.setattr(pricing, "KEPT_INPUTS", room)
    recorder = Recorder()
    recorder.install(monkeypatch)
    ids = tokens(5, 9)
    stream = open_stream(tiny_llama, batch_tokens=18)
    scores, prices = price(stream, ids, formats=FORMATS, seed=2, folder=tmp_path)
    model, seen = load(tiny_llama), 2  # two micro-batches of two windows would be more than half of the tokens
    check_scores(model, ids[:seen], scores, draws=1)
    brute = brute_force(model, ids[:seen], prices, recorder, draws=1, seed=2)
    assert_close(prices.nats, brute.token.mean(0))
    with torch.no_grad():
        labels = draw_labels(model(ids).logits, draw=0, seed=2)
    whole = trace(model, ids, labels)
    for name, module in linears(model).items():
        s = whole.g[name].double().square().mean(-1)
        s[seen:] = s[:seen].mean(0)
        x = whole.x[name].double()
        expected = torch.einsum("nt,nti,ntj->ij", s, x, x) / ids.numel()
        hessian, _ = recorder.find(weight(module))
        assert float((hessian - expected).abs().max()) < CLOSE * float(expected.abs().max())
        kept = load_saliency(tmp_path, int(name.split(".")[2]), name)
        torch.testing.assert_close(kept.double(), s, rtol=CLOSE, atol=1e-9 * float(s.max()))


def test_prices_of_single_predictions(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only some positions count: their losses alone, and means over them."""
    recorder = Recorder()
    recorder.install(monkeypatch)
    ids = tokens(5, 7)
    positions = torch.rand(5, 7, generator=torch.Generator().manual_seed(2)) < 0.3
    stream = open_stream(tiny_llama, batch_tokens=14)
    _, prices = price(stream, ids, formats=FORMATS, draws=2, seed=3, folder=tmp_path, positions=positions)
    brute = brute_force(load(tiny_llama), ids, prices, recorder, draws=2, seed=3, positions=positions)
    assert_close(prices.nats, brute.token.mean(0))
    assert_close(prices.nats_sequence, brute.sequence.mean(0))


def test_hessians_beside_and_instead(tiny_llama: Path, tmp_path: Path) -> None:
    """Others' Hessians join what weights are rounded with, times a weight, or take its place; prices are the text's."""
    stream, ids, others = open_stream(tiny_llama), tokens(4, 6), tokens(3, 5, seed=1)
    place = stream.anatomy.blocks[1]

    def hessians(name: str) -> dict[str, Tensor]:
        return load_hessians(tmp_path / name, place, stream.device)

    price(stream, others, formats=(), folder=tmp_path / "others")
    plain = price(stream, ids, formats=["int3g16"], folder=tmp_path / "plain")[1]
    price(stream, ids, formats=["int3g16"], folder=tmp_path / "both", beside=[(tmp_path / "others", 2.0)])
    instead = price(stream, ids, formats=["int3g16"], folder=tmp_path / "instead", rounded_for=tmp_path / "others")[1]
    for name, hessian in hessians("both").items():
        torch.testing.assert_close(hessian, hessians("plain")[name] + 2 * hessians("others")[name])
        torch.testing.assert_close(hessians("instead")[name], hessians("others")[name])
    assert instead.nats.sum() > plain.nats.sum()  # rounded for another text


@pytest.mark.parametrize("room", [0, 20_000], ids=["none", "some"])
def test_what_a_block_keeps_between_its_passes_changes_nothing(
    room: int, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flows that are kept, pulled again, or partly both."""
    pulled: list[int] = []

    def counted(*args: Any) -> Any:
        pulled.append(1)
        return pull(*args)

    pull = pricing.pull
    monkeypatch.setattr(pricing, "pull", counted)
    ids, found, pulls = tokens(5, 7), [], []
    for limit in (pricing.KEPT_FLOWS, room):
        monkeypatch.setattr(pricing, "KEPT_FLOWS", limit)
        pulled.clear()
        stream = open_stream(tiny_llama, batch_tokens=7)
        found.append(price(stream, ids, formats=FORMATS, draws=2, folder=tmp_path / str(limit)))
        pulls.append(len(pulled))
    once = stream.depth * 5 * 2
    assert pulls[0] == once
    assert pulls[1] == 2 * once if room == 0 else once < pulls[1] < 2 * once
    np.testing.assert_array_equal(found[0][1].nats, found[1][1].nats)
    np.testing.assert_array_equal(found[0][0].values, found[1][0].values)


def test_micro_batches_change_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    ids = tokens(5, 7)
    found = []
    for batch_tokens in (7, 14, 35):
        stream = open_stream(tiny_llama, batch_tokens=batch_tokens)
        found.append(price(stream, ids, formats=["int8g16"], draws=2, seed=1, folder=tmp_path / str(batch_tokens)))
    for scores, prices in found[1:]:
        # Sums in another order move a few codes by a step: 8-bit steps are 1e-2 of the price at most.
        assert_close(prices.nats, found[0][1].nats, rtol=1e-2)
        assert_close(scores.values, found[0][0].values)


@pytest.mark.parametrize("granularity", ["matrix", "unit"])
def test_a_resumed_run_gives_the_same_bits(tiny_llama: Path, tmp_path: Path, granularity: Granularity) -> None:
    ids = tokens(4, 6)

    def run() -> dict[str, Any]:
        stream = open_stream(tiny_llama, batch_tokens=12)
        scores, prices = price(
            stream, ids, formats=FORMATS, granularity=granularity, seed=0, neuron_block=16, folder=tmp_path
        )
        shards = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        values = {name: getattr(prices, name).tobytes() for name in ("nats", "nats_sequence", "stderr", "nbytes")}
        return values | shards | {"scores": scores.values.tobytes(), "groups": prices.groups}

    first = run()
    assert sorted(path.name for path in tmp_path.iterdir()) == [shard_path(tmp_path, i).name for i in range(3)]
    shard_path(tmp_path, 0).unlink()
    shard_path(tmp_path, 1).unlink()
    kept = shard_path(tmp_path, 2).stat().st_mtime_ns
    assert run() == first
    assert shard_path(tmp_path, 2).stat().st_mtime_ns == kept


def test_finished_blocks_are_not_rounded_again(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokens(2, 6)
    price(open_stream(tiny_llama), ids, formats=["int4g16"], folder=tmp_path)
    shard_path(tmp_path, 1).unlink()
    recorder = Recorder()
    recorder.install(monkeypatch)
    notes: list[tuple[float, str]] = []
    price(
        open_stream(tiny_llama),
        ids,
        formats=["int4g16"],
        folder=tmp_path,
        advance=lambda n, note: notes.append((n, note)),
    )
    assert len(recorder.calls) == 7
    assert sum(n for n, _ in notes) == 3.0  # as many as there are blocks, in parts
    recorder.calls.clear()
    collect(open_stream(tiny_llama), tmp_path, ["int4g16"], "matrix")
    assert recorder.calls == []


def test_a_given_order_of_neurons_is_used(tiny_llama: Path, tmp_path: Path) -> None:
    ids = tokens(2, 6)
    order = {layer: np.random.default_rng(layer).permutation(52) for layer in range(3)}
    _, prices = price(
        open_stream(tiny_llama), ids, formats=["int3g16"], granularity="unit", neuron_block=16, neuron_order=order,
        folder=tmp_path,
    )  # fmt: skip
    assert all((prices.neuron_order[layer] == order[layer]).all() for layer in range(3))


def test_bytes_and_notes(tiny_llama: Path, tmp_path: Path) -> None:
    """Two tokens excite 48 inputs in two directions only: damping must do, and prices stay finite."""
    _, prices = price(open_stream(tiny_llama), tokens(1, 2), formats=FORMATS, folder=tmp_path)
    i = next(i for i, group in enumerate(prices.groups) if group.name == "model.layers.1.mlp.down_proj")
    # 48 rows of 52: 2496 codes; 4 groups of at most 16, 1 of 64, 2 of 32; scales of 2 bytes; zeros of the code's width.
    assert list(prices.nbytes[i]) == [624 + 384 + 48, 936 + 96 + 18, 2496 + 192 + 96, 9984]
    assert np.isfinite(prices.nats).all()
    assert np.isinf(prices.stderr[:, 0]).all()  # one window has no spread
    assert json.dumps(prices.provenance)
    prices.save(tmp_path / "prices.safetensors")
    again = Prices.load(tmp_path / "prices.safetensors")
    assert again.groups == prices.groups
    assert (again.nats == prices.nats).all()


def test_nothing_is_left_in_the_spill_folder(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not after a failure."""
    stream = open_stream(tiny_llama, spill=tmp_path / "spill")
    price(stream, tokens(2, 4), formats=["int4g16"], folder=tmp_path / "shards", advance=ignore)
    assert not list((tmp_path / "spill").glob("*"))

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(pricing, "quantize_everywhere", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        price(stream, tokens(2, 4), formats=["int4g16"], folder=tmp_path / "others")
    assert not list((tmp_path / "spill").glob("*"))
