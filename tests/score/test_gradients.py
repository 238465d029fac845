"""Gradient scores against autograd on the whole model, and the identities that hold without training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from circuitpress.behaviors import Behavior, Sentences
from circuitpress.score.activations import activation_gradients
from circuitpress.score.attribution import At, attribution_patching, part_effects
from circuitpress.score.gradients import input_gradients, integrated_gradients
from circuitpress.score.patching import patch, patch_sets
from circuitpress.score.walk import Change, base_inputs, clean_inputs
from circuitpress.stream import open_stream
from circuitpress.units import Scores, UnitId

from ..whole import rewrite, tokens
from .whole_sites import SHAPES, Key, Whole, by_unit, contrasts

NAMES = list(SHAPES)


def folder_of(name: str, request: pytest.FixtureRequest) -> Path:
    """The checkpoint of a fixture."""
    folder: Path = request.getfixturevalue(name)
    return folder


def replacement(whole: Whole, change: str) -> dict[Key, Tensor]:
    """What replaces the clean activations of every site."""
    clean = whole.sites(whole.clean)
    if change == "resample":
        return whole.sites(whole.base)
    if change == "zero":
        return {key: torch.zeros_like(z) for key, z in clean.items()}
    real = (torch.arange(8) <= whole.pairs.position[:, None])[..., None]
    return {key: ((z * real).sum(0) / real.sum(0).clamp(min=1)).expand_as(z) for key, z in clean.items()}


def same(scores: Scores, expected: Tensor, *, rel: float = 2e-3) -> None:
    """Values and errors are those of effects [units, n], to float32."""
    room = rel * float(expected.abs().max())
    np.testing.assert_allclose(scores.values, expected.mean(1).numpy(), rtol=rel, atol=room)
    np.testing.assert_allclose(scores.stderr, (expected.std(1) / expected.shape[1] ** 0.5).numpy(), rtol=rel, atol=room)


@pytest.mark.parametrize("change", ["resample", "zero", "mean"])
@pytest.mark.parametrize("name", NAMES)
def test_integrated_gradients(name: str, change: Change, request: pytest.FixtureRequest) -> None:
    folder, behavior = folder_of(name, request), contrasts()
    whole, stream = Whole(folder, behavior), open_stream(folder, batch_tokens=24)
    other, clean = replacement(whole, change), whole.sites(whole.clean)
    total = {key: torch.zeros_like(z) for key, z in clean.items()}
    for share in (1 / 6, 1 / 2, 5 / 6):
        for key, gradient in whole.gradients(whole.base + share * (whole.clean - whole.base)).items():
            total[key] += gradient / 3
    scores = integrated_gradients(stream, behavior, steps=3, change=change)
    expected = by_unit(name, scores.units, {key: (other[key] - clean[key]) * total[key] for key in clean})
    assert scores.units == stream.anatomy.units()
    same(scores, expected)
    assert (scores.method, scores.evidence) == ("integrated-gradients", "gradient")
    assert np.abs(scores.values).max() > 0.05


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_a_gate_is_minus_zero_attribution(name: str, request: pytest.FixtureRequest) -> None:
    """Gates of one on every column, one for each prompt: differentiated, not multiplied out."""
    folder, behavior = folder_of(name, request), contrasts()
    whole = Whole(folder, behavior)
    gates: dict[Key, Tensor] = {}

    def gated(key: Key) -> Any:
        def apply(x: Tensor) -> Tensor:
            gates[key] = torch.ones(len(x), 1, x.shape[-1], dtype=x.dtype, requires_grad=True)
            return x * gates[key]

        return apply

    metric, _ = whole.run(whole.clean, {key: gated(key) for key in whole.modules})
    grads = dict(zip(gates, torch.autograd.grad(metric.sum(), list(gates.values())), strict=True))
    scores = attribution_patching(open_stream(folder), behavior, change="zero")
    same(scores, -by_unit(name, scores.units, grads))


@pytest.mark.parametrize("at", ["clean", "corrupted", "both"])
def test_attribution_patching_at_either_end(tiny_llama: Path, at: At) -> None:
    behavior = contrasts()
    whole = Whole(tiny_llama, behavior)
    ends = {"clean": [whole.clean], "corrupted": [whole.base], "both": [whole.clean, whole.base]}[at]
    clean, base = whole.sites(whole.clean), whole.sites(whole.base)
    grads = [whole.gradients(end) for end in ends]
    expected = {key: (base[key] - clean[key]) * sum(g[key] for g in grads) / len(grads) for key in clean}
    scores = attribution_patching(open_stream(tiny_llama), behavior, at=at)
    same(scores, by_unit("tiny_llama", scores.units, expected))
    assert "check the ranking" in scores.provenance["warning"]


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_grad_drop(name: str, request: pytest.FixtureRequest) -> None:
    """Block l's output is its input plus a constant: the gradient passes it by."""
    folder, behavior = folder_of(name, request), contrasts()
    whole = Whole(folder, behavior)
    clean, base = whole.sites(whole.clean), whole.sites(whole.base)
    total: Any = 0

    def constant(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        out = output[0] if isinstance(output, tuple) else output
        passed = hidden + (out - hidden).detach() + 0 * out
        return (passed, *output[1:]) if isinstance(output, tuple) else passed

    for block in whole.blocks:
        handle = block.register_forward_hook(constant, with_kwargs=True)
        grads = whole.gradients(whole.clean)
        handle.remove()
        units = open_stream(folder).anatomy.units()
        total = total + by_unit(name, units, {key: (base[key] - clean[key]) * grads[key] for key in clean}).abs()
    scores = attribution_patching(open_stream(folder, batch_tokens=24), behavior, drop=True)
    same(scores, total / (len(whole.blocks) - 1))
    assert scores.values.min() >= 0
    with pytest.raises(ValueError, match="at the clean prompt"):
        attribution_patching(open_stream(folder), behavior, drop=True, at="both")


@pytest.mark.parametrize("name", ["tiny_qwen2", "tiny_gpt2"])
def test_activation_gradients_are_complete(name: str, request: pytest.FixtureRequest) -> None:
    """All heads, or all neurons, of a block: the effects add up to what changing them together does."""
    folder, behavior = folder_of(name, request), contrasts(3)
    stream = open_stream(folder)
    sets = {
        f"{kind}-{i}": [u for u in stream.anatomy.units() if u.layer == i and u.kind == kind]
        for i in range(stream.depth) for kind in ("head", "neuron")
    }  # fmt: skip
    before, after = patch_sets(stream, behavior, sets)
    exact = np.array([float((after[key] - before).mean()) for key in sets])
    gaps = []
    for steps in (1, 12):
        scores = activation_gradients(stream, behavior, steps=steps)
        value = dict(zip(scores.units, scores.values, strict=True))
        gaps.append(np.abs(np.array([sum(value[u] for u in units) for units in sets.values()]) - exact).max())
    assert gaps[1] < 0.01 * np.abs(exact).max()
    assert gaps[1] < gaps[0] / 20  # the midpoint rule: 144 times, where the path is smooth


def test_activation_gradients_on_the_whole_model(tiny_llama: Path) -> None:
    behavior = contrasts()
    whole, total = Whole(tiny_llama, behavior), {}
    clean, base = whole.sites(whole.clean), whole.sites(whole.base)
    for key in clean:
        total[key] = torch.zeros_like(clean[key])
        for share in (0.25, 0.75):
            point = (clean[key] + share * (base[key] - clean[key])).requires_grad_(True)
            metric, _ = whole.run(whole.clean, {key: lambda _, point=point: point})
            total[key] += (base[key] - clean[key]) * torch.autograd.grad(metric.sum(), point)[0] / 2
    scores = activation_gradients(open_stream(tiny_llama, batch_tokens=24), behavior, steps=2)
    same(scores, by_unit("tiny_llama", scores.units, total))
    with pytest.raises(ValueError, match="steps is 0"):
        activation_gradients(open_stream(tiny_llama), behavior, steps=0)
    with pytest.raises(ValueError, match="steps is 0"):
        integrated_gradients(open_stream(tiny_llama), behavior, steps=0)


@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("name", NAMES)
def test_queries_keys_and_values(name: str, part: Any, request: pytest.FixtureRequest) -> None:
    folder, behavior = folder_of(name, request), contrasts()
    whole, (heads, kv_heads, width) = Whole(folder, behavior), SHAPES[name]
    count = heads if part == "query" else kv_heads
    fused = name == "tiny_gpt2"
    where = ("query", "key", "value").index(part)
    columns = slice(where * heads * width, (where + 1) * heads * width) if fused else slice(0, count * width)
    fixed, plain = [], []
    for i, block in enumerate(whole.blocks):
        module = block.attn.c_attn if fused else getattr(block.self_attn, f"{part[0]}_proj")  # pyright: ignore
        seen: list[Tensor] = []
        handle = module.register_forward_hook(lambda _, __, y, seen=seen: seen.append(y))
        whole.run(whole.base)
        metric, at = whole.run(whole.clean.clone().requires_grad_(True))
        handle.remove()
        gradient, above = torch.autograd.grad(metric.sum(), [seen[1], at["o", i]])
        effect = ((seen[0] - seen[1]) * gradient)[..., columns].sum(1)
        plain.append(effect.unflatten(1, (count, width)).sum(-1))

        def swapped(_: nn.Module, __: Any, y: Tensor, value: Tensor = seen[0]) -> Tensor:
            return torch.cat([y[..., : columns.start], value[..., columns], y[..., columns.stop :]], -1)

        handle = module.register_forward_hook(swapped)
        z = whole.sites(whole.clean)["o", i]
        handle.remove()
        effect = ((z - at["o", i]) * above).sum(1).unflatten(1, (count, -1)).sum(-1)
        fixed.append(effect)
    for fix, expected in ((True, fixed), (False, plain)):
        scores = part_effects(open_stream(folder, batch_tokens=24), behavior, part, fix=fix)
        same(scores, torch.cat(expected, 1).T.detach())
        assert {unit.kind for unit in scores.units} == {"head" if part == "query" else "kv_group"}
    gap = float((torch.cat(fixed, 1) - torch.cat(plain, 1)).detach().abs().max())
    assert (gap < 1e-9) == (part == "value")  # z is linear in values, so the fix changes nothing there


def test_linear_above_the_last_mlp_attribution_is_exact(tiny_llama: Path) -> None:
    """With a final norm that is linear, the last block's neurons act linearly: one gradient is the whole truth."""
    behavior, stream = contrasts(), open_stream(tiny_llama)
    stream._norm = nn.Linear(48, 48, bias=False).requires_grad_(False)
    last = [unit for unit in stream.anatomy.units() if unit.layer == 2 and unit.kind == "neuron"]
    exact, estimate = patch(stream, behavior, last), attribution_patching(stream, behavior)
    value = dict(zip(estimate.units, estimate.values, strict=True))
    np.testing.assert_allclose([value[unit] for unit in last], exact.values, rtol=1e-3, atol=1e-5)
    assert np.abs(exact.values).max() > 1e-3
    earlier = patch(stream, behavior, [UnitId(0, "head", 1)])
    assert value[UnitId(0, "head", 1)] != pytest.approx(earlier.values[0], rel=0.01)


DEAD = (UnitId(1, "head", 4), UnitId(0, "neuron", 17), UnitId(2, "kv_group", 1))


def test_planted_dead_units_score_exactly_zero(tiny_llama: Path, tmp_path: Path) -> None:
    def kill(state: dict[str, Tensor]) -> None:
        state["model.layers.1.self_attn.o_proj.weight"][:, 32:40] = 0
        state["model.layers.0.mlp.down_proj.weight"][:, 17] = 0
        state["model.layers.2.self_attn.o_proj.weight"][:, 16:32] = 0

    stream, behavior = open_stream(rewrite(tiny_llama, tmp_path / "dead", change=kill)), contrasts()
    dead = {*DEAD, UnitId(2, "head", 2), UnitId(2, "head", 3)}
    results = [
        integrated_gradients(stream, behavior), attribution_patching(stream, behavior, drop=True),
        activation_gradients(stream, behavior, steps=2), patch(stream, behavior, stream.anatomy.units()[:9]),
        *(patch(stream, behavior, sorted(dead), change=change) for change in ("resample", "zero", "mean")),
    ]  # fmt: skip
    for scores in results:
        value = dict(zip(scores.units, scores.values, strict=True))
        assert all(value[unit] == 0 for unit in dead & set(scores.units))
        assert all(value[unit] != 0 for unit in set(scores.units) - dead)


def test_permuted_heads_permute_scores(tiny_llama: Path, tmp_path: Path) -> None:
    """Heads are renumbered within their groups, and groups among one another."""
    groups, order = [2, 0, 1], [5, 4, 1, 0, 2, 3]

    def permute(state: dict[str, Tensor]) -> None:
        for i in range(3):
            prefix = f"model.layers.{i}.self_attn"
            for part, chosen in (("q", order), ("k", groups), ("v", groups)):
                weight = state[f"{prefix}.{part}_proj.weight"]
                state[f"{prefix}.{part}_proj.weight"] = weight.unflatten(0, (-1, 8))[chosen].flatten(0, 1)
            weight = state[f"{prefix}.o_proj.weight"]
            state[f"{prefix}.o_proj.weight"] = weight.unflatten(1, (-1, 8))[:, order].flatten(1)

    behavior = contrasts()
    other = open_stream(rewrite(tiny_llama, tmp_path / "permuted", change=permute))
    stream = open_stream(tiny_llama)
    for method in (integrated_gradients, activation_gradients, attribution_patching):
        before, after = (method(s, behavior).values for s in (stream, other))
        for kind, chosen in (("head", order), ("kv_group", groups), ("neuron", list(range(52)))):
            for i in range(3):
                mine = [n for n, u in enumerate(stream.anatomy.units()) if u.layer == i and u.kind == kind]
                room = 1e-4 * np.abs(before).max()
                np.testing.assert_allclose(after[mine], before[mine][chosen], rtol=1e-3, atol=room)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_sentences_start_from_the_mean_input(name: str, request: pytest.FixtureRequest) -> None:
    lengths = torch.tensor([6, 4]), torch.tensor([5, 6])
    pairs = Sentences(tokens(2, 6), tokens(2, 6, seed=2), *lengths, torch.tensor([1, 2]))
    behavior, stream = Behavior("s", "sentence", pairs), open_stream(folder_of(name, request), batch_tokens=12)
    clean, base = (torch.cat(list(x)) for x in (clean_inputs(stream, behavior), base_inputs(stream, behavior)))
    real = torch.arange(6) < torch.cat(lengths)[:, None]
    for t in range(6):
        torch.testing.assert_close(base[0, t], clean[real[:, t], t].mean(0))
        assert torch.equal(base[0, t], base[3, t])
    units, effects = input_gradients(stream, behavior, [0.5])
    assert effects.shape == (len(units), 2)
    before, after = patch_sets(stream, behavior, {"all": units})
    assert before.shape == after["all"].shape == (2,)
    # The loss of a text against its own tokens in another order runs the good sentence alone.
    text = Behavior("t", "loss", Sentences(pairs.good, pairs.bad, lengths[0], lengths[0], torch.tensor([1, 1])))
    assert input_gradients(stream, text, [0.5])[1].shape == (len(units), 2)


def test_kl_of_the_own_clean_run_is_recovered_along_the_path(tiny_llama: Path) -> None:
    from dataclasses import replace

    behavior, stream = replace(contrasts(), metric="kl"), open_stream(tiny_llama)
    before, after = patch_sets(stream, behavior, {"half": stream.anatomy.blocks[0].units()})
    assert float(before.abs().max()) < 1e-5
    assert float(after["half"].max()) < -1e-3
    # At the clean run itself the gradient of KL is zero, so one gradient there sees nothing; along the path it does.
    assert np.abs(attribution_patching(stream, behavior).values).max() < 1e-4
    assert np.abs(integrated_gradients(stream, behavior).values).max() > 1e-3
