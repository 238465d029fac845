"""The one hook mechanism: capture, gate and replace inside a resident decoder block, with a self-test.

Everything that looks into a model or intervenes in it goes through four context managers over plain torch hooks, which
are removed in `finally`:

- `capture` records input and output of named linear maps,
- `gate` rewrites the input of one linear map (a head is a run of columns of `o`, a neuron is one column of `down`),
- `emit` rewrites the output of one,
- `replace` swaps the weights of linear maps.

`input_of` is a `capture` that stops the pass where it has what it wants.

Hooks that silently do nothing are the recurring fault of tools in this field (a renamed module, a fused path, an
alias), so `self_test` proves on real weights that captured inputs reproduce captured outputs and that a gate changes
exactly what it must. It runs once per loaded model.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

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


class _Reached(Exception):
    """Ends a pass that has come far enough."""


def input_of(module: nn.Module, name: str, run: Callable[[], object]) -> Tensor:
    """The input [..., cols] of the submodule `name` in the pass `run()`, which ends there and computes nothing more.

    ValueError if the pass never comes there.
    """
    seen: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Reached

    handle = module.get_submodule(name).register_forward_pre_hook(before)
    try:
        run()
    except _Reached:
        return seen[0]
    finally:
        handle.remove()
    raise ValueError(f"the pass never calls {name}")


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
def emit(module: nn.Module, name: str, rewrite: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Passes the output [..., rows] of the submodule `name` through `rewrite`, which must return a new tensor."""

    def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:  # noqa: ARG001
        return rewrite(output)

    handle = module.get_submodule(name).register_forward_hook(after)
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
    2. Closing all columns of `o` (of `down`) leaves only the bias in its output and changes the block; closing one unit
       changes its columns, no others, and the output follows. That one unit moves the block is not asked for: rounding
       can leave a unit without weights, and bfloat16 can swallow what a single neuron adds.
    `run` maps a block input [batch, length, hidden] to the block's output; `hidden` is such an input.
    """
    names = [block.local(matrix) for matrix in block.matrices]
    with torch.no_grad():
        with capture(module, names) as clean:
            output = run(hidden)
        for matrix, name in zip(block.matrices, names, strict=True):
            _check_product(module, block, matrix, clean[name])
        for kind in ("head", "neuron"):
            role, columns = unit_columns(block, kind, 0)
            matrix = block.role(role)
            name = block.local(matrix)
            before = clean[name]
            assert before.input is not None and before.output is not None
            with capture(module, [name]) as seen, gate(module, name, torch.zeros_like):
                changed = run(hidden)
            y, bias = seen[name].output, _bias(module, name, before.output)
            if y is None or not torch.equal(y, bias):
                _fail(matrix.module, "closing all of its inputs leaves an output")
            if not torch.equal(before.output, bias) and torch.equal(changed, output):
                _fail(matrix.module, "closing all of its inputs changes nothing")
            with capture(module, [name]) as seen, gate(module, name, lambda x, c=columns: _closed(x, c)):
                run(hidden)
            x = seen[name].input
            if x is None or not torch.equal(x, _closed(before.input, columns)):
                _fail(f"L{block.index}.{kind}.0", "closing it does not close its columns, or closes others")
            _check_product(module, block, matrix, seen[name])


def _check_product(module: nn.Module, block: Block, matrix: Matrix, seen: Captured) -> None:
    x, y = seen.input, seen.output
    if x is None or y is None:
        _fail(matrix.module, "the forward pass never calls it")
    expected = x @ weight_of(module, block, matrix).T + _bias(module, block.local(matrix), y)
    # One rounding of the output type, with room for another order of summation.
    tolerance = 64 * torch.finfo(y.dtype).eps * float(expected.abs().max())
    if not torch.allclose(expected, y, rtol=0, atol=tolerance):
        _fail(matrix.module, "its output is not its weight times its input")


def _bias(module: nn.Module, name: str, output: Tensor) -> Tensor:
    """What a linear map puts out for an input of zero, in the shape of `output`."""
    bias = module.get_submodule(name).bias
    return bias.expand_as(output) if isinstance(bias, Tensor) else torch.zeros_like(output)


def _closed(x: Tensor, columns: slice) -> Tensor:
    x = x.clone()
    x[..., columns] = 0
    return x


def _fail(site: str, cause: str) -> NoReturn:
    hint = "scores of this model would be wrong: report the architecture and the transformers version"
    raise CheckpointError(f"self-test of the hooks failed at {site}: {cause}", hint=hint)
