"""Variants that walk up together against whole models with the same edits made by hand."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from circuitpress.hooks import gate, replace
from circuitpress.score.variants import Edit, carry, measure, measure_windows
from circuitpress.stream import open_stream

from ..whole import divergence, linears, load, tokens, weight


def noise(shape: torch.Size, seed: int) -> Tensor:
    return 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_edits_in_one_several_and_all_blocks(name: str, request: pytest.FixtureRequest) -> None:
    folder, ids = request.getfixturevalue(name), tokens(5, 7)
    stream, model = open_stream(folder, batch_tokens=14), load(folder)
    matrices = [block.role("up") for block in stream.anatomy.blocks]
    dense = [weight(linears(model)[matrix.module]) for matrix in matrices]
    changes = {"first": (0,), "last": (2,), "ends": (0, 2), "all": (0, 1, 2)}
    new = {
        (variant, i): dense[i].float() + noise(dense[i].shape, 10 * i + len(variant))
        for variant, layers in changes.items()
        for i in layers
    }

    def edits(index: int, module: nn.Module, _: Callable[[int], Tensor]) -> Mapping[str, Edit]:
        name, transposed = stream.anatomy.blocks[index].local(matrices[index]), matrices[index].transposed
        mine = [variant for variant, layers in changes.items() if index in layers]
        return {v: partial(replace, module, {name: new[v, index]}, transposed=transposed) for v in mine}

    measured = measure(stream, ids, edits)
    assert set(measured) == set(changes)
    with torch.no_grad():
        clean = model(ids).logits
    for variant, layers in changes.items():
        old = {i: dense[i].clone() for i in layers}
        for i in layers:
            dense[i].copy_(new[variant, i])
        with torch.no_grad():
            changed = model(ids).logits
        for i in layers:
            dense[i].copy_(old[i])
        kl, result = divergence(clean, changed), measured[variant]
        # float32 logits: KL is good to 1e-6.
        assert result.kl == pytest.approx(float(kl.mean()), rel=1e-3), variant
        assert result.kl_stderr == pytest.approx(float(kl.mean(1).std() / 5**0.5), rel=1e-3)
        loss = nn.functional.cross_entropy(changed[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert result.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)


def test_edits_leave_nothing_behind(tiny_llama: Path) -> None:
    """An edit that does nothing has KL 0 beside others that change the same block."""
    stream = open_stream(tiny_llama)

    def edits(index: int, module: nn.Module, _: Callable[[int], Tensor]) -> Mapping[str, Edit]:
        name = stream.anatomy.blocks[index].local(stream.anatomy.blocks[index].role("q"))
        return {
            "zero": partial(replace, module, {name: torch.zeros(48, 48)}, transposed=False),
            "gated": partial(gate, module, name, torch.zeros_like),
            "none": nullcontext,
        }

    measured = measure(stream, tokens(2, 5), edits)
    assert measured["none"].kl == 0
    # No query, by weights or by inputs, is the same.
    assert measured["zero"].kl == pytest.approx(measured["gated"].kl, rel=1e-6) != 0


def test_the_context_sees_the_unchanged_model(tiny_llama: Path) -> None:
    """`edits` gets the inputs of the context batches, also in blocks above a change."""
    stream, ids, context = open_stream(tiny_llama, batch_tokens=10), tokens(3, 5), tokens(4, 5, seed=9)
    model = load(tiny_llama, torch.float32)
    with torch.no_grad():
        states = model(context, output_hidden_states=True).hidden_states
    seen: list[int] = []

    def edits(index: int, module: nn.Module, inputs: Callable[[int], Tensor]) -> Mapping[str, Edit]:
        for b in range(2):
            torch.testing.assert_close(inputs(b), states[index][2 * b : 2 * b + 2], rtol=0, atol=1e-4)
        seen.append(index)
        return {"closed": partial(gate, module, "mlp.down_proj", torch.zeros_like)}

    measured = measure(stream, ids, edits, context=context)
    assert seen == [0, 1, 2]
    assert measured["closed"].tokens == 15  # the context is not measured


def test_what_the_walk_keeps_is_cleared(tiny_llama: Path, tmp_path: Path) -> None:
    stream = open_stream(tiny_llama, spill=tmp_path / "spill")

    def fail(*_: object) -> Mapping[str, Edit]:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        measure(stream, tokens(2, 4), fail)
    assert not list((tmp_path / "spill").glob("*"))


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_edits_outside_the_blocks(name: str, request: pytest.FixtureRequest) -> None:
    """Embedding alone, lm_head alone and both (of a tied matrix all are one), beside a change in a block."""
    folder, ids = request.getfixturevalue(name), tokens(5, 7)
    stream, model = open_stream(folder, batch_tokens=14), load(folder)
    modules = [matrix.module for matrix in stream.anatomy.outer]
    new = {
        module: stream.outer_weight(module) + noise(torch.Size((97, stream.anatomy.hidden)), 3) for module in modules
    }
    variants = {f"only {module}": [module] for module in modules} | {"all": modules}
    outer = {label: partial(stream.outer, {module: new[module] for module in mine}) for label, mine in variants.items()}
    up = stream.anatomy.blocks[1].role("up")
    dense = weight(linears(model)[up.module])
    changed_up = dense.float() + noise(dense.shape, 5)

    def edits(index: int, module: nn.Module, _: Callable[[int], Tensor]) -> Mapping[str, Edit]:
        local = stream.anatomy.blocks[index].local(up)
        edit = partial(replace, module, {local: changed_up}, transposed=up.transposed)
        return {"all": edit, "block": edit} if index == 1 else {}

    measured = measure(stream, ids, edits, outer=outer)
    each = measure_windows(stream, ids, edits, outer=outer)
    assert set(measured) == set(each) == {*variants, "block"}
    with torch.no_grad():
        clean = model(ids).logits
        for label, mine in (variants | {"block": []}).items():
            old = {module: model.get_submodule(module).weight.clone() for module in mine}
            for module in mine:
                model.get_submodule(module).weight.copy_(new[module])
            before = dense.clone()
            if label in ("all", "block"):
                dense.copy_(changed_up)
            kl = divergence(clean, model(ids).logits)
            dense.copy_(before)
            for module in mine:
                model.get_submodule(module).weight.copy_(old[module])
            assert measured[label].kl == pytest.approx(float(kl.mean()), rel=1e-3), label
            assert each[label] == pytest.approx(kl.mean(1).numpy(), rel=2e-3)


@pytest.mark.parametrize("outer", [False, True])
def test_prompts_and_text_walk_together(outer: bool, tiny_llama: Path) -> None:
    """Sets of prompts of several lengths and text in one walk, as each of them alone."""
    stream = open_stream(tiny_llama, batch_tokens=14)
    place = stream.anatomy.blocks[1]
    up = place.role("up")
    changed = weight(linears(load(tiny_llama))[up.module]).float() + noise(torch.Size((up.rows, up.cols)), 1)
    embedding = stream.outer_weight("model.embed_tokens") + noise(stream.outer_weight("model.embed_tokens").shape, 2)

    def edits(index: int, module: nn.Module, _: Callable[[int], Tensor]) -> Mapping[str, Edit]:
        return {"v": partial(replace, module, {place.local(up): changed}, transposed=False)} if index == 1 else {}

    around = {"v": partial(stream.outer, {"model.embed_tokens": embedding})} if outer else {}
    sets, text = [tokens(5, 7), tokens(2, 11, seed=1)], tokens(3, 9, seed=2)
    states, divergence = carry(stream, sets, text, edits, outer=around)["v"]
    assert divergence == measure(stream, text, edits, outer=around)["v"]
    for rows, found in zip(sets, states, strict=True):
        alone, _ = carry(stream, [rows], text[:1], edits, outer=around)["v"]
        assert [len(batch) for batch in found] == [len(ids) for ids in stream.batches(rows)]
        assert all(torch.equal(a, b) for a, b in zip(found, alone[0], strict=True))
        model = load(tiny_llama, torch.float32)
        weight(linears(model)[up.module]).copy_(changed)
        if outer:
            model.model.embed_tokens.weight.data.copy_(embedding)
        with torch.no_grad(), around.get("v", nullcontext)():
            torch.testing.assert_close(
                stream.logits(torch.cat(found)), model(rows).logits, rtol=1e-4, atol=1e-4, check_dtype=False
            )
