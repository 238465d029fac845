"""Verification against interventions of `score.patching`, which measures the same sets of units another way."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from circuitpress.errors import CircuitpressError
from circuitpress.mech.circuits import Circuit, Settings, Verification, find_circuit, verify_circuit
from circuitpress.mech.circuits.checks import Units, curve
from circuitpress.mech.circuits.rig import open_rig
from circuitpress.score.patching import patch_sets
from circuitpress.stream import Stream, open_stream
from circuitpress.units import UnitId

from ...organisms import DATA, compiled_induction, ioi, repeated_tokens

NODES = ("L0.head.1", "L1.head.2")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    """The compiled induction circuit."""
    return open_stream(compiled_induction(tmp_path_factory.mktemp("compiled")))


@pytest.fixture(scope="module")
def trained() -> Stream:
    """A trained Llama with two key-value groups, whose second layer is redundant."""
    return open_stream(DATA / "seed-1")


@pytest.fixture(scope="module")
def circuit(trained: Stream) -> Circuit:
    """Its circuit."""
    return find_circuit(trained, ioi().behavior(32))


@pytest.fixture(scope="module")
def checked(trained: Stream, circuit: Circuit) -> Verification:
    """What ablation says about that circuit, against all circuits of its size."""
    return verify_circuit(trained, ioi().behavior(32), circuit, random=300)


def units_of(stream: Stream, nodes: tuple[str, ...]) -> tuple[UnitId, ...]:
    """Heads, and MLPs as all of their neurons."""
    neurons = {block.index: block.neurons for block in stream.anatomy.blocks}
    found: list[UnitId] = []
    for node in nodes:
        layer = int(node[1])
        found += [UnitId(layer, "neuron", i) for i in range(neurons[layer])] if "mlp" in node else [UnitId.parse(node)]
    return tuple(found)


def shares(stream: Stream, circuit: Circuit, gone: list[tuple[str, ...]]) -> list[float]:
    """f of the model without each of the sets of nodes, by patching activations of units."""
    task = ioi().behavior(32)
    sets = {str(i): units_of(stream, nodes) for i, nodes in enumerate(gone)}
    clean, after = patch_sets(stream, task, sets)
    low = circuit.provenance["metric_empty"]
    return [(float(after[name].mean()) - low) / (float(clean.mean()) - low) for name in sets]


def test_all_figures_equal_patching_of_units(trained: Stream, circuit: Circuit, checked: Verification) -> None:
    every, members = circuit.graph.nodes, circuit.nodes
    outside = tuple(node for node in every if node not in members)
    gone = [outside, members, *(subset.missing for subset in checked.completeness[1:3])]
    gone += [(*outside, *subset.missing) for subset in checked.completeness[1:3]]
    gone += [(*outside, need.unit) for need in checked.minimality]
    gone += [group.heads for group in checked.groups] + [(head,) for head in checked.groups[0].heads]
    expected = shares(trained, circuit, gone)
    got = [checked.faithfulness.value, checked.completeness[0].model]
    got += [subset.model for subset in checked.completeness[1:3]]
    got += [subset.circuit for subset in checked.completeness[1:3]]
    got += [checked.faithfulness.value - need.alone for need in checked.minimality]
    got += [1 - group.together for group in checked.groups] + [1 - value for value in checked.groups[0].single]
    assert np.allclose(got, expected, rtol=0, atol=1e-4)
    for need in checked.minimality:
        assert circuit.necessity[need.unit] == pytest.approx(need.alone, abs=1e-5)


def test_the_trained_circuit_is_faithful_minimal_and_no_accident(circuit: Circuit, checked: Verification) -> None:
    full, draws = checked.faithfulness, checked.random
    assert full.value == pytest.approx(circuit.faithfulness, abs=1e-5)
    assert full.value >= 0.9
    assert full.low < full.value < full.high
    assert draws.every and draws.count == len(list(combinations(range(10), circuit.size)))
    assert full.value - draws.mean > 0.4
    assert draws.percentile > 98
    assert abs(checked.completeness[0].model) < 0.1
    assert min(need.alone for need in checked.minimality) > 0.01
    assert checked.evidence == "causal"


def test_heads_that_stand_in_for_one_another_are_told_apart(trained: Stream, checked: Verification) -> None:
    by_layer = {group.heads: group for group in checked.groups}
    first, second = (by_layer[tuple(f"L{i}.head.{h}" for h in range(4))] for i in (0, 1))
    assert not first.redundant
    assert max(first.single) > 0.9 * first.together
    assert second.together > 0.4
    last = [need for need in checked.minimality if need.unit.startswith("L1.head")]
    assert all(need.last is not None for need in last)
    assert [need.last for need in checked.minimality if need.unit.endswith(".mlp")] == [None]
    del trained


def test_random_circuits_are_drawn_once_and_with_a_seed(compiled: Stream) -> None:
    found = replace(find_circuit(compiled, repeated_tokens(12)), nodes=NODES)
    drawn = [verify_circuit(compiled, repeated_tokens(12), found, random=20, subsets=2, seed=s) for s in (3, 3, 4)]
    assert drawn[0].to_json() == drawn[1].to_json()
    assert drawn[0].random != drawn[2].random
    assert drawn[0].random.count == 20 and not drawn[0].random.every
    every = verify_circuit(compiled, repeated_tokens(12), found, random=45, subsets=0)
    assert every.random.every and every.random.count == 45
    assert every.random.percentile == pytest.approx(100 * 44 / 45)
    assert every.random.mean == pytest.approx(every.faithfulness.value / 45, abs=0.05)
    assert len(every.completeness) == 1


@pytest.mark.parametrize(("ablation", "low", "high"), [("resample", 0.9, 1.1), ("mean", 2, 3), ("zero", 3, 4)])
def test_what_replaces_the_rest_decides_the_figure(compiled: Stream, ablation: str, low: float, high: float) -> None:
    """The distractors do nothing but fill the norms: silenced, they leave the circuit two to four times as loud."""
    task = repeated_tokens(24)
    found = replace(find_circuit(compiled, task), nodes=NODES)
    result = verify_circuit(compiled, task, found, ablation=ablation, random=10, subsets=0)  # pyright: ignore
    assert result.ablation == ablation
    assert low < result.faithfulness.value < high
    assert abs(result.completeness[0].model) < 0.05 * result.faithfulness.value
    assert min(need.alone for need in result.minimality) > 0.85 * result.faithfulness.value


def test_edges_are_verified_too(compiled: Stream, tmp_path: Path) -> None:
    task = repeated_tokens(24)
    found = find_circuit(compiled, task, Settings("edges", window=8))
    result = verify_circuit(compiled, task, found, random=15, subsets=3)
    assert result.granularity == "edges"
    assert result.total == found.graph.edges.sum()
    assert result.faithfulness.value == pytest.approx(found.faithfulness, abs=1e-5)
    assert result.random.mean < 0.1
    assert {need.unit for need in result.minimality} == {f"{s}>{r}" for s, r in found.edges}
    result.save(tmp_path / "verify.json")
    assert '"evidence": "causal"' in (tmp_path / "verify.json").read_text()


def test_the_areas_of_the_curve_by_hand(compiled: Stream) -> None:
    """Two nodes carry everything: f is 0 up to one of ten, and 1 from two on."""
    found = replace(find_circuit(compiled, repeated_tokens(12)), nodes=NODES)
    with open_rig(compiled, repeated_tokens(12)) as rig:
        result = curve(rig, Units.of(found), found.order)
    assert result.sizes == (0, 1, 2, 5, 10)
    assert result.shares == (0, 0.1, 0.2, 0.5, 1)
    f = np.array(result.faithfulness)
    assert np.allclose(f, [0, 0, 1, 1, 1], atol=0.05)
    steps = np.diff(result.shares)
    assert result.cpr == pytest.approx(float((steps * (f[1:] + f[:-1]) / 2).sum()))
    gap = np.abs(1 - f)
    assert result.cmd == pytest.approx(float((steps * (gap[1:] + gap[:-1]) / 2).sum()))


def test_circuits_of_other_models_and_empty_ones_are_refused(
    compiled: Stream, trained: Stream, circuit: Circuit
) -> None:
    other = replace(circuit, graph=replace(circuit.graph, kv_heads=(4, 4)))
    with pytest.raises(CircuitpressError, match="the circuit is of a model with"):
        verify_circuit(trained, ioi().behavior(8), other)
    with pytest.raises(CircuitpressError, match="has no parts"):
        verify_circuit(trained, ioi().behavior(8), replace(circuit, nodes=()))
    del compiled
