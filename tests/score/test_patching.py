"""Interventions against hooks on the whole model: units, sets, both directions, direct paths, rounded weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from circuitpress.errors import CheckpointError
from circuitpress.quantize import quantize_everywhere
from circuitpress.score.direct import direct_effects
from circuitpress.score.gradients import integrated_gradients
from circuitpress.score.patching import patch, patch_sets
from circuitpress.score.path import Path as Edge
from circuitpress.score.path import patch_paths
from circuitpress.score.rounded import round_sets, rounding_effects
from circuitpress.score.walk import Change
from circuitpress.stream import open_stream
from circuitpress.units import UnitId

from ..runtime.conftest import write_packed
from ..whole import linears
from .whole_sites import Whole, contrasts, put, span

UNITS = {
    "tiny_llama": [UnitId(0, "head", 5), UnitId(1, "kv_group", 1), UnitId(2, "neuron", 51), UnitId(2, "head", 0)],
    "tiny_gpt2": [UnitId(2, "head", 1), UnitId(0, "kv_group", 4), UnitId(1, "neuron", 3)],
    "tiny_qwen2": [UnitId(0, "head", 2), UnitId(1, "kv_group", 0), UnitId(0, "neuron", 43)],
}


@pytest.mark.parametrize("change", ["resample", "zero", "mean", "restore"])
@pytest.mark.parametrize("name", list(UNITS))
def test_single_units(name: str, change: str, request: pytest.FixtureRequest) -> None:
    folder, behavior = request.getfixturevalue(name), contrasts()
    whole, stream = Whole(folder, behavior), open_stream(folder, batch_tokens=24)
    clean, base = whole.sites(whole.clean), whole.sites(whole.base)
    real = (torch.arange(8) <= whole.pairs.position[:, None])[..., None]
    start = whole.base if change == "restore" else whole.clean
    mode: Change = "resample" if change == "restore" else change  # pyright: ignore[reportAssignmentType]
    scores = patch(stream, behavior, UNITS[name], change=mode, restore=change == "restore")
    for n, unit in enumerate(UNITS[name]):
        key, columns = span(name, unit)
        mean = ((clean[key] * real).sum(0) / real.sum(0).clamp(min=1)).expand_as(clean[key])
        value = {"resample": base[key], "zero": 0 * base[key], "mean": mean, "restore": clean[key]}[change]
        with torch.no_grad():
            effect = whole.run(start, {key: put(columns, value)})[0] - whole.run(start)[0]
        assert scores.values[n] == pytest.approx(float(effect.mean()), rel=2e-3, abs=1e-5)
        assert scores.stderr[n] == pytest.approx(float(effect.std() / 5**0.5), rel=2e-3, abs=1e-5)
    assert scores.evidence == "causal"
    assert scores.provenance["metric"] == "logit_diff"


def test_sets_change_together(tiny_llama: Path) -> None:
    behavior = contrasts()
    whole, stream = Whole(tiny_llama, behavior), open_stream(tiny_llama, batch_tokens=24)
    sets = {"mixed": UNITS["tiny_llama"], "all": stream.anatomy.units(), "none": ()}
    before, after = patch_sets(stream, behavior, {name: units for name, units in sets.items() if units})
    base = whole.sites(whole.base)
    rewrites: dict[Any, Any] = {}
    for unit in UNITS["tiny_llama"]:
        key, columns = span("tiny_llama", unit)
        inner = rewrites.get(key, lambda x: x)
        rewrites[key] = lambda x, inner=inner, key=key, columns=columns: put(columns, base[key])(inner(x))
    with torch.no_grad():
        expected = whole.run(whole.clean, rewrites)[0]
        np.testing.assert_allclose(before.numpy(), whole.run(whole.clean)[0].numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(after["mixed"].numpy(), expected.numpy(), rtol=1e-4, atol=1e-4)
    # Everything restored but the embedding: not the clean metric, but what the clean parts say about the answer.
    _, restored = patch_sets(stream, behavior, {"all": stream.anatomy.units()}, restore=True)
    assert not torch.allclose(restored["all"], after["all"])


@pytest.mark.parametrize(
    ("unit", "cause"),
    [
        (UnitId(3, "head", 0), "L3.head.0 does not exist: the model has layers 0 to 2"),
        (UnitId(1, "neuron", 52), "L1.neuron.52 is not a unit of this block"),
    ],
)
def test_units_that_do_not_exist(tiny_llama: Path, unit: UnitId, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        patch(open_stream(tiny_llama), contrasts(), [unit])


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_qwen2"])
def test_direct_attribution_sums_to_the_metric(name: str, request: pytest.FixtureRequest) -> None:
    folder, behavior = request.getfixturevalue(name), contrasts()
    whole, found = Whole(folder, behavior), direct_effects(open_stream(folder, batch_tokens=24), behavior)
    with torch.no_grad():
        metric, seen = whole.run(whole.clean)
    assert found.gap() < 3e-5
    np.testing.assert_allclose(found.total.numpy(), metric.numpy(), rtol=1e-4, atol=1e-4)
    # One head and one neuron by hand: through the output matrix, the frozen norm and the unembedding.
    model, rows = whole.model, torch.arange(5)
    norm = model.model.norm if hasattr(model, "model") else model.transformer.ln_f
    finals: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, args: finals.append(args[0]))
    with torch.no_grad():
        whole.run(whole.clean)
    handle.remove()
    final = finals[0][rows, whole.pairs.position]
    unembedding = model.get_output_embeddings().weight
    u = unembedding[whole.pairs.answer] - unembedding[whole.pairs.wrong]
    layered = name == "tiny_gpt2"
    scale = final.var(-1, unbiased=False) if layered else final.square().mean(-1)
    eps = norm.eps if layered else norm.variance_epsilon
    for unit in (UnitId(0, "head", 1), UnitId(1, "neuron", 7), UnitId(1, "kv_group", 0)):
        key, columns = span(name, unit)
        weight = whole.modules[key].weight
        weight = weight[columns] if layered else weight[:, columns].T
        written = (seen[key][rows, whole.pairs.position][:, columns] @ weight).detach()
        centred = written - written.mean(-1, keepdim=True) if layered else written
        expected = ((centred * norm.weight * u).sum(-1) / (scale + eps).sqrt()).detach()
        n = found.scores.units.index(unit)
        np.testing.assert_allclose(found.units[n].numpy(), expected.numpy(), rtol=1e-4, atol=1e-5)
        assert found.scores.values[n] == pytest.approx(-float(expected.mean()), rel=1e-4, abs=1e-5)
    assert found.scores.evidence == "correlational"


EDGES = [
    Edge(UnitId(0, "head", 1), UnitId(2, "head", 3)),
    Edge(UnitId(0, "head", 1), UnitId(2, "head", 3), "query"),
    Edge(UnitId(0, "head", 1), UnitId(2, "head", 3), "key"),
    Edge(UnitId(0, "head", 1), UnitId(1, "head", 4), "value"),
    Edge(UnitId(0, "neuron", 9), UnitId(1, "neuron", 30)),
    Edge(UnitId(1, "head", 2), UnitId(1, "neuron", 11)),
    Edge(UnitId(0, "head", 1)),
    Edge(UnitId(2, "head", 0)),
    Edge(UnitId(2, "neuron", 5)),
]


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_direct_paths(name: str, request: pytest.FixtureRequest) -> None:
    """By freezing: every site but the sender's is clamped to its clean value, and the receiver is read off."""
    folder, behavior = request.getfixturevalue(name), contrasts()
    whole = Whole(folder, behavior)
    clean, base = whole.sites(whole.clean), whole.sites(whole.base)
    with torch.no_grad():
        metric = whole.run(whole.clean)[0]
    found = patch_paths(open_stream(folder, batch_tokens=24), behavior, EDGES)
    for n, edge in enumerate(EDGES):
        key, columns = span(name, edge.sender)
        frozen: dict[Any, Any] = {k: (lambda _, z=z: z) for k, z in clean.items()}
        frozen[key] = lambda _, key=key, columns=columns: put(columns, base[key])(clean[key])
        if edge.receiver is None:
            with torch.no_grad():
                changed = whole.run(whole.clean, frozen)[0]
        else:
            changed = _received(name, whole, frozen, edge)
        assert found.values[n] == pytest.approx(float((changed - metric).mean()), rel=5e-3, abs=2e-5), str(edge)
    assert np.abs(found.values).min() > 0
    assert found.evidence == "causal"


def _received(name: str, whole: Whole, frozen: dict[Any, Any], edge: Edge) -> Tensor:
    """The metric when the receiver alone has what it computes from the frozen run."""
    receiver = edge.receiver
    assert receiver is not None
    at, columns = span(name, receiver)
    handles = []
    if edge.part is not None:
        # The other two parts of the receiving attention are those of the clean run.
        block = whole.blocks[receiver.layer]
        fused = name == "tiny_gpt2"
        modules = {"all": block.attn.c_attn} if fused else {  # pyright: ignore
            part: getattr(block.self_attn, f"{part[0]}_proj") for part in ("query", "key", "value")  # pyright: ignore
        }  # fmt: skip
        kept: dict[str, Tensor] = {}
        taps = [m.register_forward_hook(lambda _, __, y, p=p: kept.update({p: y.detach()})) for p, m in modules.items()]
        whole.sites(whole.clean)
        for tap in taps:
            tap.remove()

        def hold(y: Tensor, part: str) -> Tensor:
            if not fused:
                return y if part == edge.part else kept[part]
            pieces, old = y.split(40, -1), kept["all"].split(40, -1)
            parts = zip(("query", "key", "value"), pieces, old, strict=True)
            return torch.cat([y if p == edge.part else z for p, y, z in parts], -1)

        handles = [m.register_forward_hook(lambda _, __, y, p=p: hold(y, p)) for p, m in modules.items()]
    seen: dict[str, Tensor] = {}
    frozen = dict(frozen)
    original = frozen[at]
    frozen[at] = lambda x: (seen.update(x=x.detach()), original(x))[1]
    with torch.no_grad():
        whole.run(whole.clean, frozen)
        for handle in handles:
            handle.remove()
        return whole.run(whole.clean, {at: put(columns, seen["x"])})[0]


@pytest.mark.parametrize(
    ("edge", "cause"),
    [
        (Edge(UnitId(1, "head", 0), UnitId(1, "head", 2)), "does not come after the sender"),
        (Edge(UnitId(1, "neuron", 0), UnitId(1, "neuron", 2)), "does not come after the sender"),
        (Edge(UnitId(0, "head", 0), UnitId(1, "neuron", 2), "key"), "a neuron has one input"),
        (Edge(UnitId(0, "head", 9), UnitId(1, "neuron", 2)), "L0.head.9 is not a unit"),
        (Edge(UnitId(0, "head", 0), UnitId(7, "neuron", 2)), "L7.neuron.2 does not exist"),
    ],
)
def test_paths_that_carry_nothing(tiny_llama: Path, edge: Edge, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        patch_paths(open_stream(tiny_llama), contrasts(), [edge])


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_rounding_one_unit(name: str, request: pytest.FixtureRequest) -> None:
    """The whole model with rounded rows and columns written into its weights by hand."""
    folder, behavior = request.getfixturevalue(name), contrasts()
    stream = open_stream(folder, batch_tokens=24)
    head, neurons = UnitId(1, "head", 3), [UnitId(0, "neuron", n) for n in (2, 3, 40)]
    before, after = round_sets(
        stream, behavior, {"head": [head], "mlp": neurons}, ["int2", "int8", "dense"], group_size=16
    )
    for unit in ("head", "mlp"):
        assert torch.equal(after["dense"][unit], before)
    kept = torch.arange(8) <= whole_position(behavior)[:, None]
    for set_name, places in _owned(name).items():
        whole = Whole(folder, behavior)
        modules, moments = linears(whole.model), {}
        for module, _, _ in places:
            moments[module] = whole_input(whole, modules[module])[kept]
        for module, axis, index in places:
            weight, at = modules[module].weight.data, torch.tensor(index)  # pyright: ignore
            weight = weight.T if name == "tiny_gpt2" else weight
            x = moments[module].float()
            hessian = x.T @ x / len(x)
            if axis == "rows":
                weight[at] = rounded(weight[at], hessian)
            else:
                weight[:, at] = rounded(weight[:, at], hessian[at][:, at])
        with torch.no_grad():
            expected = whole.run(whole.clean)[0]
        np.testing.assert_allclose(after["int2"][set_name].numpy(), expected.numpy(), rtol=1e-3, atol=1e-3)
    scores = rounding_effects(stream, behavior, [head], ["int2", "int8"], group_size=16)
    assert scores["int2"].values[0] == pytest.approx(float((after["int2"]["head"] - before).mean()), rel=1e-6)
    # The mean over prompts may vanish by chance; how far each of them moves does not.
    moved = {form: float((after[form]["head"] - before).abs().mean()) for form in ("int2", "int8")}
    assert 0 < moved["int8"] < moved["int2"] / 5
    assert scores["int2"].evidence == "causal"


def whole_input(whole: Whole, module: Any) -> Tensor:
    """What enters a module in the clean run."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    whole.sites(whole.clean)
    handle.remove()
    return seen[0]


def rounded(weight: Tensor, hessian: Tensor) -> Tensor:
    """Weights as int2 with groups of 16."""
    return quantize_everywhere(weight.float(), hessian, ["int2g16"])[0]["int2g16"].decode().double()


def whole_position(behavior: Any) -> Tensor:
    """The last position of every prompt."""
    return behavior.pairs.position


def _owned(name: str) -> dict[str, list[tuple[str, str, list[int]]]]:
    """Rows and columns of L1.head.3 and of three neurons of block 0, counted by hand."""
    mine = list(range(24, 32))
    if name == "tiny_gpt2":
        return {
            "head": [("transformer.h.1.attn.c_attn", "rows", [*mine, *(40 + i for i in mine), *(80 + i for i in mine)]),
                     ("transformer.h.1.attn.c_proj", "cols", mine)],
            "mlp": [("transformer.h.0.mlp.c_fc", "rows", [2, 3, 40]),
                    ("transformer.h.0.mlp.c_proj", "cols", [2, 3, 40])],
        }  # fmt: skip
    layer, mlp = "model.layers.1.self_attn", "model.layers.0.mlp"
    group = list(range(8, 16))  # head 3 reads key-value head 1
    return {
        "head": [(f"{layer}.q_proj", "rows", mine), (f"{layer}.k_proj", "rows", group),
                 (f"{layer}.v_proj", "rows", group), (f"{layer}.o_proj", "cols", mine)],
        "mlp": [(f"{mlp}.gate_proj", "rows", [2, 3, 40]), (f"{mlp}.up_proj", "rows", [2, 3, 40]),
                (f"{mlp}.down_proj", "cols", [2, 3, 40])],
    }  # fmt: skip


def test_packed_models_are_scored_by_activations_only(tiny_llama: Path, tmp_path: Path) -> None:
    choices = {
        f"model.layers.{i}.{name}": ("rows", [("int4g16", 0, rows)])
        for i in range(3)
        for name, rows in (("self_attn.q_proj", 48), ("self_attn.o_proj", 48), ("mlp.down_proj", 48))
    }
    folders, behavior = write_packed(tiny_llama, choices, tmp_path, transposed=False), contrasts()
    packed, dense = open_stream(folders.folder), open_stream(folders.dense)
    patched, direct = lambda s, b: patch(s, b, UNITS["tiny_llama"]), lambda s, b: direct_effects(s, b).scores
    for method in (integrated_gradients, patched, direct):
        np.testing.assert_allclose(
            method(packed, behavior).values, method(dense, behavior).values, rtol=1e-4, atol=1e-5
        )
    with pytest.raises(CheckpointError, match="weights are rounded already") as caught:
        rounding_effects(packed, behavior, [UnitId(0, "head", 0)], ["int4"])
    assert "score the original checkpoint" in (caught.value.hint or "")
