"""The one hook mechanism: capture, gate and replace inside a resident decoder block, with a self-test.

Everything that looks into a model or intervenes in it goes through three context managers over plain torch hooks, which
are removed in `finally`:

- `capture` records input and output of named linear maps,
- `gate` rewrites the input of one linear map (a head is a run of columns of `o`, a neuron is one column of `down`),
- `replace` swaps the weights of linear maps.

Hooks that silently do nothing are the recurring fault of tools in this field (a renamed module, a fused path, an alias),
so `self_test` proves on real weights that captured inputs reproduce captured outputs and that a gate changes exactly
what it must. It runs once per loaded model.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .anatomy import Block, Matrix
from .errors import CheckpointError


@dataclass
class Captured:
    """What one linear map saw in the last forward pass: input [..., cols] and output [..., rows]."""

    input: Tensor | None = None
    output: Tensor | None = None


@contextlib.contextmanager
def capture(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Captured]]:
    """Records input and output of the submodules `names` of `module` for as long as the context lasts."""
    seen = {name: Captured() for name in names}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def record(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name].input, seen[name].output = args[0], output

        return record

    handles = [module.get_submodule(name).register_forward_hook(recorder(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def gate(module: nn.Module, name: str, rewrite: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Passes the input [..., cols] of the submodule `name` through `rewrite`, which must return a new tensor."""

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (rewrite(args[0]), *args[1:])

    handle = module.get_submodule(name).register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def replace(module: nn.Module, weights: Mapping[str, Tensor], *, transposed: bool) -> Iterator[None]:
    """Swaps the weights of submodules (name -> [rows, cols], rows are outputs) and puts the old ones back."""
    old = {name: module.get_submodule(name).weight for name in weights}
    try:
        for name, weight in weights.items():
            before = old[name]
            assert isinstance(before, Tensor)
            value = (weight.T if transposed else weight).to(before.dtype).contiguous()
            module.get_submodule(name).weight = nn.Parameter(value, requires_grad=False)
        yield
    finally:
        for name, parameter in old.items():
            module.get_submodule(name).weight = parameter


def weight_of(module: nn.Module, block: Block, matrix: Matrix) -> Tensor:
    """The weights [rows, cols] of one matrix of a resident block, as a view."""
    weight = module.get_submodule(block.local(matrix)).weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if matrix.transposed else weight.detach()


def unit_columns(block: Block, kind: str, index: int) -> tuple[str, slice]:
    """Where a unit enters the residual stream: the role of the matrix and the columns of its input.

    A head is `head_dim` columns of `o`; a key-value group the columns of all heads that read it; a neuron one column of
    `down`. ValueError for any other kind or an index out of range.
    """
    group = block.heads // block.kv_heads
    spans = {
        "head": ("o", block.heads, block.head_dim),
        "kv_group": ("o", block.kv_heads, block.head_dim * group),
        "neuron": ("down", block.neurons, 1),
    }
    if kind not in spans or not 0 <= index < spans[kind][1]:
        counts = ", ".join(f"{count} x {name}" for name, (_, count, _) in spans.items())
        raise ValueError(f"L{block.index}.{kind}.{index} is not a unit of this block: it has {counts}")
    role, _, width = spans[kind]
    return role, slice(index * width, (index + 1) * width)


def self_test(module: nn.Module, block: Block, run: Callable[[Tensor], Tensor], hidden: Tensor) -> None:
    """Proves that hooks on this block see and change what they claim; CheckpointError names the site that fails.

    1. For every matrix, captured input times weight plus bias is the captured output.
    2. Closing all columns of `o` (of `down`) leaves only the bias in its output, and closing one unit changes the block.
    `run` maps a block input [batch, length, hidden] to the block's output; `hidden` is such an input.
    """
    names = [block.local(matrix) for matrix in block.matrices]
    with torch.no_grad():
        with capture(module, names) as seen:
            clean = run(hidden)
        for matrix, name in zip(block.matrices, names, strict=True):
            x, y = seen[name].input, seen[name].output
            if x is None or y is None:
                _fail(matrix.module, "the forward pass never calls it")
            bias = module.get_submodule(name).bias
            expected = x @ weight_of(module, block, matrix).T + (0 if bias is None else bias)
            # One rounding of the output type, with room for another order of summation.
            tolerance = 64 * torch.finfo(y.dtype).eps * float(expected.abs().max())
            if not torch.allclose(expected, y, rtol=0, atol=tolerance):
                _fail(matrix.module, "its output is not its weight times its input")
        for kind in ("head", "neuron"):
            role, columns = unit_columns(block, kind, 0)
            name = block.local(block.role(role))
            with capture(module, [name]) as seen, gate(module, name, torch.zeros_like):
                run(hidden)
            y, bias = seen[name].output, module.get_submodule(name).bias
            assert y is not None
            if bool((y != (0 if bias is None else bias)).any()):
                _fail(block.role(role).module, "closing all of its inputs leaves an output")
            with capture(module, [name]) as seen, gate(module, name, lambda x, c=columns: _closed(x, c)):
                changed = run(hidden)
            x = seen[name].input
            assert x is not None
            if bool((x[..., columns] != 0).any()) or not bool((changed != clean).any()):
                _fail(f"L{block.index}.{kind}.0", "closing it changes nothing")


def _closed(x: Tensor, columns: slice) -> Tensor:
    x = x.clone()
    x[..., columns] = 0
    return x


def _fail(site: str, cause: str) -> None:
    hint = "scores of this model would be wrong: report the architecture and the transformers version"
    raise CheckpointError(f"self-test of the hooks failed at {site}: {cause}", hint=hint)
