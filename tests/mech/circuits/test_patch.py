"""The engine against brute force in float64 on every family: no edge, all edges, random edges, each edge alone."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from circuitpress.errors import CheckpointError
from circuitpress.mech.circuits import patch
from circuitpress.mech.circuits.graph import Graph, Mask, graph_of
from circuitpress.mech.circuits.parts import record, reference
from circuitpress.mech.circuits.patch import check_engine, run_patched, variant
from circuitpress.mech.circuits.split import Slot, Split
from circuitpress.stream import Stream, open_stream

from ...whole import MODELS, load, tokens
from . import brute

CLEAN, CORRUPTED = tokens(3, 7), tokens(3, 7, seed=1)


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest) -> Path:
    """A tiny checkpoint of one family."""
    return request.getfixturevalue(request.param)


def opened(folder: Path, rows: int = 2) -> Stream:
    """The model in float64, in micro-batches of `rows` prompts."""
    return open_stream(folder, dtype="float64", batch_tokens=rows * CLEAN.shape[1])


def engine(stream: Stream, masks: list[Mask]) -> list[Tensor]:
    """The final hidden states of all prompts with each mask of edges patched."""
    graph = graph_of(stream.anatomy)
    parts = reference(stream, stream.batches(CORRUPTED), torch.full((3,), 6), "resample")
    runs = run_patched(stream, graph, stream.batches(CLEAN), parts, [variant(graph, mask) for mask in masks])
    return [torch.cat(run) for run in runs]


def whole(folder: Path, graph: Graph, masks: list[Mask]) -> list[Tensor]:
    """The same by brute force."""
    model = load(folder)
    with torch.no_grad():
        _, other = brute.run(model, brute.embed(model, CORRUPTED))
        start = brute.embed(model, CLEAN)
        return [brute.run(model, start, patched=set(graph.names(mask)), other=other)[0] for mask in masks]


def close(got: Tensor, wanted: Tensor) -> bool:
    """Equal but for roundings of the few operations that transformers does in float32 in any case."""
    return bool(torch.allclose(got, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max())))


def test_without_patches_the_logits_are_those_of_transformers(folder: Path) -> None:
    stream = open_stream(folder, dtype="float32")
    graph = graph_of(stream.anatomy)
    (final,) = engine(stream, [np.zeros_like(graph.edges)])
    with torch.no_grad():
        expected = load(folder, torch.float32)(CLEAN).logits
        assert torch.allclose(stream.logits(final), expected, rtol=0, atol=1e-4)


def test_with_all_edges_patched_it_is_the_corrupted_run(folder: Path) -> None:
    stream = opened(folder)
    graph = graph_of(stream.anatomy)
    _, states = record(stream, [CORRUPTED], "x")
    parts = reference(stream, [CORRUPTED], torch.full((3,), 6), "resample")
    for default in (None, np.zeros(len(graph.senders), dtype=np.bool_), np.arange(len(graph.senders)) % 2 == 0):
        ((final,),) = run_patched(stream, graph, [CLEAN], parts, [variant(graph, graph.edges, default=default)])
        assert close(final, states[0])


def test_random_sets_of_edges_equal_brute_force(folder: Path) -> None:
    stream = opened(folder)
    graph = graph_of(stream.anatomy)
    draw = np.random.default_rng(0)
    masks = [graph.edges & (draw.random(graph.edges.shape) < share) for share in (0.1, 0.5, 0.9)]
    masks.append(graph.edges & ~graph.edges_of_nodes(graph.nodes[::2]))
    for got, wanted in zip(engine(stream, masks), whole(folder, graph, masks), strict=True):
        assert close(got, wanted)


@pytest.mark.parametrize("name", ["tiny_qwen3", "tiny_gpt2"])
def test_every_edge_alone_equals_brute_force(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    stream = opened(folder)
    graph = graph_of(stream.anatomy)
    edges = graph.names(graph.edges)
    chosen = edges if name == "tiny_qwen3" else edges[::7]
    masks = [graph.mask([edge]) for edge in chosen]
    clean = engine(stream, [np.zeros_like(graph.edges)])[0]
    got, wanted = engine(stream, masks), whole(folder, graph, masks)
    moved = 0
    for edge, one, other in zip(chosen, got, wanted, strict=True):
        assert close(one, other), edge
        moved += not torch.equal(one, clean)
    assert moved > 0.8 * len(chosen)


def test_groups_of_variants_and_shared_beginnings_change_nothing(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = opened(tiny_llama)
    graph = graph_of(stream.anatomy)
    masks = [graph.edges & ~graph.edges_of_nodes(graph.nodes[:n]) for n in (3, 9, 18)] + [graph.edges.copy()]
    masks += [graph.mask([("L1.head.2", "L2.mlp")]), graph.mask([("L1.head.2", "L2.mlp"), ("L2.mlp", "logits")])]
    together = engine(stream, masks)
    monkeypatch.setattr(patch, "LIMIT", 1)
    for one, other in zip(together, engine(stream, masks), strict=True):
        assert torch.equal(one, other)
    for one, mask in zip(together, masks, strict=True):
        assert torch.equal(one, engine(stream, [mask])[0])


@pytest.mark.parametrize("slot", [("q", 4), ("k", 1), ("v", 2)])
def test_the_self_test_notices_an_input_that_is_not_exchanged(
    slot: Slot, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = opened(tiny_llama)
    graph = graph_of(stream.anatomy)
    check_engine(stream, graph, CLEAN[:1], CORRUPTED[:1])
    real = Split._rewritten

    def deaf(self: Split, attention: Mapping[Slot, Tensor]) -> AbstractContextManager[None]:
        return real(self, {key: x for key, x in attention.items() if key != slot})

    monkeypatch.setattr(Split, "_rewritten", deaf)
    with pytest.raises(CheckpointError, match="self-test of patching failed"):
        check_engine(stream, graph, CLEAN[:1], CORRUPTED[:1])


def test_the_self_test_notices_a_part_that_is_not_the_senders(tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = opened(tiny_gpt2)
    graph = graph_of(stream.anatomy)
    check_engine(stream, graph, CLEAN[:1], CORRUPTED[:1])
    real = Split.write
    monkeypatch.setattr(Split, "write", lambda self, z: real(self, z).roll(1, -2))
    with pytest.raises(CheckpointError, match="self-test of patching failed"):
        check_engine(stream, graph, CLEAN[:1], CORRUPTED[:1])


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_mean_and_zero_ablation_of_nodes(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    stream, model = opened(folder), load(folder)
    graph = graph_of(stream.anatomy)
    position = torch.tensor([6, 3, 4])  # the mean at position t is over prompts that reach it
    with torch.no_grad():
        _, other = brute.run(model, brute.embed(model, CORRUPTED))
        real = (torch.arange(7) <= position[:, None])[..., None].double()
        mean = {
            name: ((part * real).sum(0) / real.sum(0).clamp(min=1)).expand(3, 7, -1) for name, part in other.items()
        }
        zero = {name: torch.zeros_like(part) for name, part in other.items()}
        gone = graph.edges & ~graph.edges_of_nodes(["L0.head.1", "L1.mlp", "L2.head.4"])
        for ablation, values in (("mean", mean), ("zero", zero)):
            parts = reference(stream, stream.batches(CORRUPTED), position, ablation)  # pyright: ignore
            (run,) = run_patched(stream, graph, stream.batches(CLEAN), parts, [variant(graph, gone)])
            expected, _ = brute.run(model, brute.embed(model, CLEAN), patched=set(graph.names(gone)), other=values)
            assert close(torch.cat(run), expected)


def test_a_block_without_the_usual_norms_is_refused(tiny_llama: Path) -> None:
    stream = opened(tiny_llama)
    with stream.block(0) as module:
        del module.post_attention_layernorm
        with pytest.raises(CheckpointError, match="the norm before the mlp is none of"):
            Split(stream, module, stream.anatomy.blocks[0]).run(torch.zeros(1, 2, 48, dtype=torch.float64))
