"""Circuits that are known: compiled by hand, and in trained models where a single gradient goes wrong."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from circuitpress.behaviors import Behavior, Pairs, Sentences
from circuitpress.errors import CircuitpressError
from circuitpress.mech.circuits import Circuit, Settings, find_circuit
from circuitpress.mech.circuits.rig import open_rig
from circuitpress.stream import Stream, open_stream

from ...organisms import DATA, SEEDS, compiled_induction, ioi, repeated_tokens


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    """The compiled induction circuit."""
    return open_stream(compiled_induction(tmp_path_factory.mktemp("compiled")))


@pytest.mark.parametrize("method", ["ig", "attribution"])
def test_the_compiled_nodes_are_found_exactly(compiled: Stream, method: str) -> None:
    found = find_circuit(compiled, repeated_tokens(), Settings(method=method))  # pyright: ignore[reportArgumentType]
    assert found.nodes == ("L0.head.1", "L1.head.2")
    assert found.faithfulness > 0.99
    assert found.evidence == "causal"
    assert min(found.necessity.values()) > 0.9
    # The three heads and MLPs outside write what nobody reads; two of them have no weights.
    scores = dict(zip(found.graph.nodes, found.scores, strict=True))
    assert scores["L0.head.2"] == scores["L1.head.1"] == 0
    assert set(found.edges) == {edge for edge in found.graph.names(found.kept) if edge[1] not in OUTSIDE}


OUTSIDE = {f"L{i}.head.{h}.q" for i, h in ((0, 0), (0, 2), (0, 3), (1, 0), (1, 1), (1, 3))} | {"L0.mlp", "L1.mlp"}
OUTSIDE |= {f"L{i}.kv_group.{h}.{part}" for i, h in ((0, 0), (0, 2), (0, 3), (1, 0), (1, 1), (1, 3)) for part in "kv"}


@pytest.mark.parametrize("selection", ["top", "greedy"])
def test_the_compiled_edges_are_found_exactly(compiled: Stream, selection: str) -> None:
    """The token is copied one place on (v of the first head), matched there (k of the second), and predicted."""
    settings = Settings("edges", selection=selection, target=0.95)  # pyright: ignore[reportArgumentType]
    found = find_circuit(compiled, repeated_tokens(), settings)
    assert set(found.edges) == {
        ("embed", "L0.kv_group.1.v"),
        ("L0.head.1", "L1.kv_group.2.k"),
        ("L1.head.2", "logits"),
    }
    assert found.nodes == ("L0.head.1", "L1.head.2")
    assert found.faithfulness > 0.95


@pytest.mark.parametrize("seed", SEEDS)
def test_trained_models_need_a_head_that_one_gradient_misses(seed: int) -> None:
    """A head of layer 0, which single gradients rank behind the last MLP in all four models."""
    stream, task = open_stream(DATA / f"seed-{seed}"), ioi().behavior(48)
    found = find_circuit(stream, task)
    assert found.faithfulness >= 0.9
    assert found.size < 7
    decisive = max(found.necessity, key=lambda name: found.necessity[name])
    assert decisive.startswith("L0.head")
    assert found.graph.nodes[found.order[0]] == decisive
    cheap = find_circuit(stream, task, Settings(method="attribution", window=0, size=1))
    assert cheap.nodes == ("L1.mlp",)
    assert (cheap.evidence, cheap.necessity, cheap.method) == ("gradient", {}, "attribution patching")


def test_the_same_seed_finds_the_same_circuit(compiled: Stream, tmp_path: Path) -> None:
    for name in "ab":
        find_circuit(compiled, repeated_tokens(16), Settings("edges", window=4)).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_micro_batches_change_nothing(compiled: Stream) -> None:
    small = open_stream(compiled.anatomy.folder, batch_tokens=5 * 15)
    task = repeated_tokens(11)
    one, other = (find_circuit(stream, task, Settings("edges", window=0)) for stream in (compiled, small))
    assert one.edges == other.edges
    assert np.allclose(one.scores, other.scores, rtol=0, atol=1e-5 * np.abs(one.scores).max())


def test_a_given_size_is_cut_there_and_idle_parts_are_pruned(compiled: Stream) -> None:
    assert find_circuit(compiled, repeated_tokens(), Settings(size=1)).size == 1
    # Some distractors outside reach the norms: a hundredth of the effect, which a higher tolerance calls none.
    pruned = find_circuit(compiled, repeated_tokens(), Settings(size=5, tolerance=0.03))
    assert pruned.nodes == ("L0.head.1", "L1.head.2")
    kept = find_circuit(compiled, repeated_tokens(), Settings(size=5, window=0))
    assert kept.size == 5
    assert kept.provenance["size_at_cut"] == 5


def test_a_part_that_the_gradient_ranks_last_is_swapped_in(compiled: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores of the induction head are erased: the circuit of two nodes must get it back by ablation."""
    from circuitpress.mech.circuits import find

    real = find.edge_scores

    def blind(*args: object, **options: object) -> object:
        scores = real(*args, **options)  # pyright: ignore
        scores[:, args[1].sender_index["L1.head.2"]] *= 1e-9  # pyright: ignore
        return scores

    monkeypatch.setattr(find, "edge_scores", blind)
    plain = find_circuit(compiled, repeated_tokens(), Settings(size=2, window=0))
    assert "L1.head.2" not in plain.nodes
    assert find_circuit(compiled, repeated_tokens(), Settings(size=2)).nodes == ("L0.head.1", "L1.head.2")


def test_metric_kl_and_loss_work_too(compiled: Stream) -> None:
    for metric in ("kl", "loss"):
        found = find_circuit(compiled, replace(repeated_tokens(), metric=metric))
        assert {"L0.head.1", "L1.head.2"} <= set(found.nodes)
        assert found.provenance["metric"] == metric


def test_what_has_no_circuit_is_refused(compiled: Stream) -> None:
    task = repeated_tokens()
    assert isinstance(task.pairs, Pairs)
    turned = replace(task, pairs=replace(task.pairs, clean=task.pairs.corrupted, corrupted=task.pairs.clean))
    with pytest.raises(CircuitpressError, match="there is no effect to find a circuit for"):
        find_circuit(compiled, turned)
    rows, one = task.pairs.clean, task.pairs.position + 1
    sentences = Behavior("words", "sentence", Sentences(rows, task.pairs.corrupted, one, one, one - 1))
    with pytest.raises(CircuitpressError, match="'words' has sentences") as caught, open_rig(compiled, sentences):
        pass
    assert caught.value.hint is not None and "contrast pairs" in caught.value.hint


def test_protection_covers_heads_and_whole_mlps(compiled: Stream) -> None:
    found = replace(find_circuit(compiled, repeated_tokens()), nodes=("L0.head.1", "L1.mlp"))
    assert found.patterns == ("L0.head.1", "L1.neuron.*")
    assert [str(unit) for unit in found.units({0: 3, 1: 2})] == ["L0.head.1", "L1.neuron.0", "L1.neuron.1"]


def test_a_circuit_comes_back_from_its_file(compiled: Stream, tmp_path: Path) -> None:
    for granularity in ("nodes", "edges"):
        found = find_circuit(compiled, repeated_tokens(16), Settings(granularity, window=4))
        path = tmp_path / "circuit.json"
        found.save(path)
        back = Circuit.load(path)
        for name in ("graph", "granularity", "nodes", "edges", "faithfulness", "method", "evidence", "necessity"):
            assert getattr(back, name) == getattr(found, name), name
        assert back.provenance == found.provenance
        assert np.allclose(back.scores, found.scores, rtol=1e-5, atol=0)
        assert (back.order == found.order).all()
        assert (back.kept == found.kept).all()
        back.save(tmp_path / "again.json")
        assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"graph": 3}'])
def test_a_file_that_is_no_circuit(text: str, tmp_path: Path) -> None:
    with pytest.raises(CircuitpressError, match="cannot read the circuit"):
        Circuit.load(tmp_path / "none.json")
    path = tmp_path / "circuit.json"
    path.write_text(text)
    with pytest.raises(CircuitpressError, match="is not a circuit"):
        Circuit.load(path)
