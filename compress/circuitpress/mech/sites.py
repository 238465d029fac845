"""The places of a model that can be read and rewritten, one value for each, on any supported architecture.

A `Site` is a layer and one of six names; with x_i the residual stream at the input of block i,

    resid_pre   x_i                                   hidden
    head_out    what all heads found, the input of o  heads * head_dim    head h is its columns h*head_dim onwards
    attn_out    what attention adds to x_i            hidden
    neurons     the input of down                     neurons
    mlp_out     what the MLP adds                     hidden
    resid_post  x_(i+1)                               hidden

1. `read` runs a resident block once and returns what passed through the sites asked for.
2. `rewriting` puts a function between a site and everything that reads it, for as long as a context lasts.
3. `walk` runs the blocks up to the last one that is needed, and no further.
4. `collect` keeps the activations of a few sites; `stream` them into a `Store` where they do not fit in memory.

Everything rides on hooks.py's capture and gate, whose self-test has proven on this checkpoint that `o` and `down` are
called and that their input is what enters the residual stream. Names are also known under TransformerLens's hooks
(blocks.3.hook_resid_post), under which SAEs are published.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..console import Advance, ignore
from ..errors import RecipeError
from ..hooks import capture, gate
from ..store import Store
from ..stream import Stream

SiteName = Literal["resid_pre", "head_out", "attn_out", "neurons", "mlp_out", "resid_post"]
NAMES: tuple[SiteName, ...] = get_args(SiteName)

_HOOKS: dict[SiteName, tuple[str, ...]] = {
    "resid_pre": ("hook_resid_pre", "hook_in"),
    "head_out": ("attn.hook_z", "attn.o.hook_in"),
    "attn_out": ("hook_attn_out", "attn.hook_out"),
    "neurons": ("mlp.hook_post", "mlp.out.hook_in"),
    "mlp_out": ("hook_mlp_out", "mlp.hook_out"),
    "resid_post": ("hook_resid_post", "hook_out"),
}
"""TransformerLens's names inside `blocks.i.`, the classic ones first: those are what SAE folders hold."""


@dataclass(frozen=True, order=True)
class Site:
    """One place of the model: `Site(4, "resid_post")` prints as `L4.resid_post`; layers count from 0."""

    layer: int
    name: SiteName

    def __str__(self) -> str:
        return f"L{self.layer}.{self.name}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `L4.resid_post` or a TransformerLens hook; RecipeError names the forms there are."""
        match = re.fullmatch(r"L(\d+)\.([a-z_]+)", text)
        if match is not None and match[2] in NAMES:
            return cls(int(match[1]), match[2])  # pyright: ignore[reportArgumentType]
        hook = re.fullmatch(r"blocks\.(\d+)\.([a-z_.]+)", text)
        for name, known in _HOOKS.items():
            if hook is not None and hook[2] in known:
                return cls(int(hook[1]), name)
        raise RecipeError(
            [f"{text!r} is not a site"], hint=f"write L<layer>.<{'|'.join(NAMES)}>, such as L4.resid_post"
        )

    @property
    def hook(self) -> str:
        """The name that TransformerLens and SAELens give this place."""
        return f"blocks.{self.layer}.{_HOOKS[self.name][0]}"

    def width(self, anatomy: Anatomy) -> int:
        """Numbers per token at this site; RecipeError if the model has no such layer."""
        if not 0 <= self.layer < len(anatomy.blocks):
            raise RecipeError(
                [f"{self} does not exist: the model has layers 0 to {len(anatomy.blocks) - 1}"],
                hint="choose a layer of the model",
            )
        block = anatomy.blocks[self.layer]
        return {"head_out": block.role("o").cols, "neurons": block.neurons}.get(self.name, anatomy.hidden)


def read(
    stream: Stream, index: int, module: nn.Module, hidden: Tensor, names: Sequence[SiteName]
) -> tuple[dict[SiteName, Tensor], Tensor]:
    """Runs resident block `index` on `hidden` [batch, length, hidden]: the named sites and the block's output."""
    block = stream.anatomy.blocks[index]
    o, down = block.local(block.role("o")), block.local(block.role("down"))
    with capture(module, [o, down]) as seen:
        output = stream.run(index, module, hidden)
    found = {
        "resid_pre": hidden,
        "head_out": seen[o].input,
        "attn_out": seen[o].output,
        "neurons": seen[down].input,
        "mlp_out": seen[down].output,
        "resid_post": output,
    }
    return {name: found[name] for name in names}, output  # pyright: ignore[reportReturnType]


@contextlib.contextmanager
def rewriting(
    stream: Stream, index: int, module: nn.Module, name: SiteName, change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Passes what flows through a site of resident block `index` through `change`, which must return a new tensor."""
    block = stream.anatomy.blocks[index]
    o, down = block.local(block.role("o")), block.local(block.role("down"))

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(args[0]), *args[1:])

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    if name in ("head_out", "neurons"):
        with gate(module, o if name == "head_out" else down, change):
            yield
        return
    if name == "resid_pre":
        handle = module.register_forward_pre_hook(before)
    else:
        local = {"attn_out": o, "mlp_out": down}.get(name)
        handle = (module if local is None else module.get_submodule(local)).register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


Visit = Callable[[int, nn.Module, int, Tensor], Tensor]
"""Called with block index, resident block, micro-batch and its input; returns the block's output."""


@torch.no_grad()
def walk(
    stream: Stream, batches: Sequence[Tensor], visit: Visit, *, depth: int | None = None, advance: Advance = ignore
) -> Store:
    """Walks token ids through blocks 0 to depth - 1 (default: all); a `Store` with the outputs (depth, b)."""
    depth = stream.depth if depth is None else depth
    store = stream.store("sites")
    for b, ids in enumerate(batches):
        store.put((0, b), stream.embed(ids))
    for index in range(depth):
        with stream.block(index) as module:
            for b in range(len(batches)):
                store.put((index + 1, b), visit(index, module, b, store.get((index, b), stream.device)))
                store.drop((index, b))
        advance(1, f"block {index}")
    return store


def collect(
    stream: Stream,
    batches: Sequence[Tensor],
    sites: Sequence[Site],
    *,
    into: Store | None = None,
    advance: Advance = ignore,
) -> Store:
    """The activations [batch, length, width] of `sites` under keys (str(site), b); blocks above them are not run."""
    store = into or Store(None)
    for site in sites:
        site.width(stream.anatomy)
    wanted: dict[int, list[SiteName]] = {
        index: [site.name for site in sites if site.layer == index] for index in range(stream.depth)
    }

    def visit(index: int, module: nn.Module, b: int, hidden: Tensor) -> Tensor:
        found, output = read(stream, index, module, hidden, wanted[index])
        for name, value in found.items():
            store.put((str(Site(index, name)), b), value)
        return output

    walk(stream, batches, visit, depth=max(site.layer for site in sites) + 1, advance=advance).clear()
    return store
