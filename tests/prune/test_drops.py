"""Drop prices against the definition, on the whole model in transformers and float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from circuitpress.anatomy import read_anatomy
from circuitpress.prune import default_ladder, price_drops
from circuitpress.stream import open_stream
from circuitpress.units import UnitId
from circuitpress.widths import Widths

from ..whole import draw_labels, load, tokens, trace, weight


@pytest.mark.parametrize(("family", "groups"), [("tiny_llama", (3, 2, 1)), ("tiny_gpt2", (5,))])
def test_prices_are_the_squared_first_order_effect_of_the_compensated_change(
    family: str, groups: tuple[int, ...], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    ids, ladder = tokens(6, 20), (52, 40, 13)
    stream = open_stream(folder, batch_tokens=64)
    drops = price_drops(stream, ids, neurons=ladder, kv_groups=groups, folder=tmp_path)
    assert drops.widths == {"neuron": ladder, "kv_group": groups}
    model = load(folder)
    seen = trace(model, ids, draw_labels(model(ids).logits.detach()))
    layers = dict(model.named_modules())
    for block in read_anatomy(folder).blocks:
        for kind, role, total in (("neuron", "down", 52), ("kv_group", "o", block.kv_heads)):
            module = block.role(role).module
            x, g = seen.x[module].flatten(0, 1), seen.g[module].flatten(0, 1)
            whole, h = weight(layers[module]), x.T @ x / len(x)
            for k, width in enumerate(drops.widths[kind]):
                left = torch.from_numpy(drops.stay(kind, block.index, width, total))
                size = whole.shape[1] // total
                stay = (left[:, None] * size + torch.arange(size)).flatten()
                change = -whole.clone()
                inner = h[stay][:, stay] + 1e-3 * h[stay][:, stay].diagonal().mean() * torch.eye(len(stay))
                gone = torch.from_numpy(np.setdiff1d(np.arange(whole.shape[1]), stay.numpy()))
                change[:, stay] = whole[:, gone] @ h[gone][:, stay] @ torch.linalg.inv(inner)
                expected = 0.5 * ((x @ change.T) * g).sum(1).square().mean()
                assert float(drops.nats[kind][block.index, k]) == pytest.approx(float(expected), rel=2e-3, abs=1e-9)
    assert drops.price(Widths(52, groups[0])) == 0
    widths = Widths(13, groups[-1])
    assert drops.price(widths) == pytest.approx(drops.nats["neuron"][:, 2].sum() + drops.nats["kv_group"][:, -1].sum())
    with pytest.raises(ValueError, match="not in tuple"):
        drops.price(Widths(50, groups[0]))


def test_a_resumed_pass_reads_its_shards_and_units_may_be_kept(tiny_llama: Path, tmp_path: Path) -> None:
    ids = tokens(4, 16)
    keep = frozenset([UnitId(1, "kv_group", 2), *(UnitId(0, "neuron", i) for i in range(5, 15))])
    asked: dict[str, Any] = {"neurons": (10, 52), "kv_groups": (1,), "keep": keep, "folder": tmp_path}
    first = price_drops(open_stream(tiny_llama), ids, **asked)
    assert first.stay("kv_group", 1, 1, 3).tolist() == [2]
    assert first.stay("neuron", 0, 10, 52).tolist() == list(range(5, 15))
    assert all(len(order) == 42 for order in first.order["neuron"])
    (tmp_path / "block-00001.safetensors").unlink()
    second = price_drops(open_stream(tiny_llama), ids, **asked)
    for kind in ("neuron", "kv_group"):
        np.testing.assert_array_equal(first.nats[kind], second.nats[kind])
    with pytest.raises(ValueError, match="43 of 52 units cannot leave: 10 of them must stay"):
        price_drops(open_stream(tiny_llama), ids, **asked | {"neurons": (9,), "folder": tmp_path / "other"})


def test_prices_do_not_depend_on_micro_batches(tiny_qwen2: Path, tmp_path: Path) -> None:
    ids = tokens(6, 20)
    found = [
        price_drops(
            open_stream(tiny_qwen2, batch_tokens=size), ids, neurons=(30,), kv_groups=(1,), folder=tmp_path / str(size)
        )
        for size in (20, 4096)
    ]
    np.testing.assert_allclose(found[0].nats["neuron"], found[1].nats["neuron"], rtol=1e-3)


def test_the_ladder(tiny_llama: Path, tiny_gpt2: Path) -> None:
    assert default_ladder(open_stream(tiny_llama)) == ((52, 49, 47, 44, 42, 39, 31, 26), (1, 2, 3))
    assert default_ladder(open_stream(tiny_gpt2))[1] == (5,)
