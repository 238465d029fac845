"""Capture, gate and replace: what they see and change, that they leave nothing behind, and the self-test."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from circuitpress.anatomy import Block, read_anatomy
from circuitpress.errors import CheckpointError
from circuitpress.hooks import Captured, capture, emit, gate, input_of, replace, self_test, unit_columns, weight_of
from circuitpress.stream import open_stream

from .whole import blocks_of, linears, load, weight


@pytest.fixture(params=["tiny_llama", "tiny_qwen2", "tiny_gpt2"])
def resident(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, Block, Callable[[Tensor], Tensor]]]:
    """Block 1 of a model, its anatomy, and its forward pass."""
    stream = open_stream(request.getfixturevalue(request.param))
    with stream.block(1) as module:
        yield module, stream.anatomy.blocks[1], lambda hidden: stream.run(1, module, hidden)


def states(module: nn.Module, *, batch: int = 2, length: int = 5) -> Tensor:
    hidden = next(p.shape[0] for name, p in module.named_parameters() if "ln_1" in name or "input_layernorm" in name)
    return torch.randn(batch, length, hidden, generator=torch.Generator().manual_seed(0))


def flow(seen: Captured) -> tuple[Tensor, Tensor]:
    """What was captured, which must be there."""
    assert seen.input is not None and seen.output is not None
    return seen.input, seen.output


def hooks_on(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_captured_maps_are_linear(resident: Any) -> None:
    module, place, run = resident
    names = [place.local(matrix) for matrix in place.matrices]
    x = states(module)
    with torch.no_grad(), capture(module, names) as seen:
        run(x)
    for matrix, name in zip(place.matrices, names, strict=True):
        inner = module.get_submodule(name)
        w = inner.weight.T if matrix.transposed else inner.weight
        assert torch.equal(weight_of(module, place, matrix), w)
        bias = 0 if inner.bias is None else inner.bias
        value, output = flow(seen[name])
        torch.testing.assert_close(output.double(), value.double() @ w.double().T + bias, rtol=0, atol=1e-5)
        assert value.shape == (2, 5, matrix.cols)
        assert output.shape == (2, 5, matrix.rows)
    assert hooks_on(module) == 0


def test_a_pass_ends_where_its_input_is_wanted(resident: Any) -> None:
    module, place, run = resident
    x, called = states(module), []
    names = [place.local(matrix) for matrix in place.matrices]
    with torch.no_grad(), capture(module, names) as seen:
        run(x)
    down = module.get_submodule(place.local(place.role("down")))
    handle = down.register_forward_hook(lambda *_: called.append("down"))
    for name in names:
        assert torch.equal(input_of(module, name, lambda: run(x)), flow(seen[name])[0])
    assert called == []
    handle.remove()
    with pytest.raises(ValueError, match="never calls"):
        input_of(module, names[0], lambda: None)
    assert hooks_on(module) == 0


def test_a_gate_rewrites_the_input(resident: Any) -> None:
    module, place, run = resident
    matrix = place.role("down")
    name, x = place.local(matrix), states(module)

    def halve(value: Tensor) -> Tensor:
        return value * torch.linspace(0, 1, matrix.cols)

    with torch.no_grad():
        with capture(module, [name]) as plain:
            clean = run(x)
        with capture(module, [name]) as seen, gate(module, name, halve):
            changed = run(x)
        after = run(x)
    # Same as scaling the columns of the weight.
    columns = weight_of(module, place, matrix) * torch.linspace(0, 1, matrix.cols)
    moved = flow(plain[name])[0] @ (columns - weight_of(module, place, matrix)).T
    torch.testing.assert_close(changed - clean, moved, rtol=0, atol=1e-4)
    assert torch.equal(flow(seen[name])[0], halve(flow(plain[name])[0]))
    assert torch.equal(after, clean)
    assert hooks_on(module) == 0


def test_emit_rewrites_the_output(resident: Any) -> None:
    """Zero out of both output projections: the block passes its input on."""
    module, place, run = resident
    x = states(module)
    o, down = (place.local(place.role(role)) for role in ("o", "down"))
    with torch.no_grad():
        before = run(x)
        with emit(module, o, torch.zeros_like), emit(module, down, torch.zeros_like):
            assert torch.equal(run(x), x)
        with emit(module, down, lambda y: y + 1):
            torch.testing.assert_close(run(x), before + 1)
        assert torch.equal(run(x), before)
    assert hooks_on(module) == 0


def test_replaced_weights_come_back(resident: Any) -> None:
    module, place, run = resident
    matrix = place.role("o")
    name, x = place.local(matrix), states(module)
    new = torch.randn(matrix.rows, matrix.cols, generator=torch.Generator().manual_seed(1))
    before = module.get_submodule(name).weight
    with torch.no_grad():
        clean = run(x)
        with capture(module, [name]) as seen, replace(module, {name: new}, transposed=matrix.transposed):
            changed = run(x)
        bias = module.get_submodule(name).bias
        value, output = flow(seen[name])
        torch.testing.assert_close(output, value @ new.T + (0 if bias is None else bias), rtol=0, atol=1e-4)
        assert not torch.equal(changed, clean)
        assert torch.equal(run(x), clean)
    assert module.get_submodule(name).weight is before


def test_failures_inside_leave_nothing_behind(resident: Any) -> None:
    module, place, _ = resident
    names = [place.local(matrix) for matrix in place.matrices]
    before = {name: module.get_submodule(name).weight for name in names}
    new = {place.local(m): torch.zeros(m.rows, m.cols) for m in place.matrices}
    transposed = place.matrices[0].transposed
    with (
        pytest.raises(RuntimeError, match="inside"),
        capture(module, names),
        gate(module, names[0], torch.zeros_like),
        replace(module, new, transposed=transposed),
    ):
        raise RuntimeError("inside")
    assert hooks_on(module) == 0
    assert all(module.get_submodule(name).weight is weight for name, weight in before.items())


def test_where_units_enter_the_residual_stream(tiny_llama: Path) -> None:
    block = read_anatomy(tiny_llama).blocks[2]
    assert unit_columns(block, "head", 5) == ("o", slice(40, 48))
    assert unit_columns(block, "kv_group", 2) == ("o", slice(32, 48))
    assert unit_columns(block, "neuron", 51) == ("down", slice(51, 52))
    counts = "it has 6 x head, 3 x kv_group, 52 x neuron"
    for kind, index in (("head", 6), ("kv_group", 3), ("neuron", 52), ("head", -1), ("expert", 0)):
        with pytest.raises(ValueError, match=rf"L2\.{kind}\.{index} is not a unit of this block: {counts}"):
            unit_columns(block, kind, index)


def test_the_self_test_passes_on_real_blocks(resident: Any) -> None:
    module, place, run = resident
    self_test(module, place, run, states(module, batch=1, length=4))
    assert hooks_on(module) == 0


class Aliased(nn.Module):
    """A linear map whose forward pass multiplies with something else than its weight."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = [inner]
        self.weight, self.bias = nn.Parameter(inner.weight * 1.01), inner.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[0](x)


class Unused(nn.Module):
    """A linear map that is there but that the forward pass goes around: a fused path."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
        return hidden @ self.down_proj.weight.T


class Constant(nn.Linear):
    """Adds one to what its weight gives: closing the inputs leaves an output."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Deaf(nn.Module):
    """An MLP whose result does not reach the residual stream."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.inner = [mlp]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[0](x) * 0


def spoil_alias(block: Any) -> None:
    block.self_attn.v_proj = Aliased(block.self_attn.v_proj)


def spoil_fusion(block: Any) -> None:
    block.mlp = Unused(block.mlp)


def spoil_constant(block: Any) -> None:
    constant = Constant(52, 48, bias=False)
    constant.weight = block.mlp.down_proj.weight
    block.mlp.down_proj = constant


def spoil_path(block: Any) -> None:
    block.mlp = Deaf(block.mlp)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_alias, r"model\.layers\.1\.self_attn\.v_proj: its output is not its weight times its input"),
        (spoil_fusion, r"model\.layers\.1\.mlp\.down_proj: the forward pass never calls it"),
        (spoil_constant, r"model\.layers\.1\.mlp\.down_proj: its output is not its weight times its input"),
        (spoil_path, r"model\.layers\.1\.mlp\.down_proj: closing all of its inputs changes nothing"),
    ],
)
def test_the_self_test_finds_hooks_that_do_not_hold(
    tiny_llama: Path, spoil: Callable[[Any], None], message: str
) -> None:
    model = load(tiny_llama, torch.float32)
    block, place = blocks_of(model)[1], read_anatomy(tiny_llama).blocks[1]
    rotary = model.model.rotary_emb(torch.zeros(1, 4, 48), torch.arange(4)[None])

    def run(hidden: Tensor) -> Tensor:
        return block(hidden, position_embeddings=rotary)

    hidden = torch.randn(1, 4, 48, generator=torch.Generator().manual_seed(0))
    self_test(block, place, run, hidden)
    spoil(block)
    with pytest.raises(CheckpointError, match=message):
        self_test(block, place, run, hidden)


def test_weight_of_is_a_view(tiny_gpt2: Path) -> None:
    model, place = load(tiny_gpt2, torch.float32), read_anatomy(tiny_gpt2).blocks[0]
    matrix = place.role("qkv")
    view = weight_of(blocks_of(model)[0], place, matrix)
    assert torch.equal(view, weight(linears(model)[matrix.module]))
    assert view.data_ptr() == linears(model)[matrix.module].weight.data_ptr()  # pyright: ignore
    assert not view.requires_grad
