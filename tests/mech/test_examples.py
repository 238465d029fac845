"""Maximally activating text against a search over the whole model's activations."""

from pathlib import Path

import pytest
import torch

from circuitpress.mech.examples import of_units
from circuitpress.stream import open_stream
from circuitpress.units import UnitId

from ..whole import load, tokens
from ..whole import weight as weight_of
from .test_sites import Site, module_of, whole_site


@pytest.mark.parametrize("checkpoint", ["tiny_llama", "tiny_gpt2"])
def test_peaks_are_those_of_the_whole_model(checkpoint: str, request: pytest.FixtureRequest) -> None:
    folder, ids = request.getfixturevalue(checkpoint), tokens(9, 11)
    model, stream = load(folder, torch.float32), open_stream(folder, batch_tokens=33)
    units = [UnitId(2, "neuron", 51), UnitId(0, "head", 4), UnitId(2, "neuron", 0)]
    rows = of_units(stream, ids, units, count=3)
    assert [row.part for row in rows] == ["L2.neuron.51", "L0.head.4", "L2.neuron.0"]
    heads = whole_site(model, ids, Site(0, "head_out"))[..., 32:40]
    written = (heads @ weight_of(module_of(model, 0, "o"))[:, 32:40].T).norm(dim=-1)
    neurons = whole_site(model, ids, Site(2, "neurons"))
    for row, values in zip(rows, (neurons[..., 51], written, neurons[..., 0]), strict=True):
        values = values.clone()
        values[:, 0] = 0  # the first position does not count
        order = values.abs().max(1).values.argsort(descending=True)[:3]
        assert [excerpt.window for excerpt in row.top] == order.tolist()
        for excerpt in row.top:
            at = excerpt.start + excerpt.peak
            assert at == int(values[excerpt.window].abs().argmax())
            assert excerpt.value == pytest.approx(float(values[excerpt.window, at]), rel=1e-3)
            assert list(excerpt.ids) == ids[excerpt.window, excerpt.start : excerpt.start + len(excerpt.ids)].tolist()
            assert excerpt.values[excerpt.peak] == excerpt.value
        assert len(row.control) == 3
        assert row.mean == pytest.approx(float(values[:, 1:].abs().mean()), rel=1e-3)
    again = of_units(stream, ids, units, count=3)
    assert [row.control for row in again] == [row.control for row in rows]
    assert rows[0].to_json(str)["top"][0]["tokens"] == [str(token) for token in rows[0].top[0].ids]


def test_a_part_without_a_value_at_a_token_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="kv_group"):
        of_units(open_stream(tiny_llama), tokens(2, 4), [UnitId(0, "kv_group", 0)])
