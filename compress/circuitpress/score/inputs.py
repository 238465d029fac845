"""What the matrices of a block read, for Hessians that need no gradient."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, Block
from ..hooks import Captured, capture
from ..stream import Stream
from .fisher import add_second_moment

Inputs = Mapping[str, Tensor]
"""What each matrix of a block reads in one micro-batch, x [tokens, cols], by module name."""


@torch.no_grad()
def matrix_inputs(stream: Stream, module: nn.Module, place: Block, hidden: Tensor) -> Inputs:
    """Runs resident block `place` on `hidden` [batch, length, hidden]."""
    with capture(module, [place.local(matrix) for matrix in place.matrices]) as seen:
        stream.run(place.index, module, hidden)
    return _by_module(place, seen)


def add_inputs(inputs: Inputs, weights: Mapping[str, Tensor], hessians: Mapping[str, Tensor]) -> None:
    """Adds sum_t weight_t x_t x_t^T of every matrix to `hessians` [cols, cols]; `weights` are [batch, length]."""
    for name, x in inputs.items():
        add_second_moment(hessians[name], x, weights[name].flatten().to(x.device))


class KeptInputs:
    """Inputs that a forward walk leaves behind for those who would run every block once more to see them.

    Those of the micro-batches from `first` on are kept, of all blocks or of none: `room` is in bytes.
    """

    def __init__(self, stream: Stream, batches: Sequence[Tensor], first: int, room: int) -> None:
        tokens = sum(ids.numel() for ids in batches[first:])
        self._anatomy, self._first = stream.anatomy, first
        self._fits = tokens * _numbers(stream.anatomy) * stream.dtype.itemsize <= room
        self._kept: dict[tuple[int, int], Inputs] = {}

    @contextlib.contextmanager
    def watch(self, index: int, b: int, module: nn.Module) -> Iterator[None]:
        """Keeps what is read while the context lasts, in which block `index` runs on micro-batch `b`."""
        if not self._fits or b < self._first:
            yield
            return
        place = self._anatomy.blocks[index]
        with capture(module, [place.local(matrix) for matrix in place.matrices]) as seen:
            yield
        self._kept[index, b] = _by_module(place, seen)

    def take(self, index: int, b: int) -> Inputs | None:
        """Hands out what was kept, once."""
        return self._kept.pop((index, b), None)


def _by_module(place: Block, seen: Mapping[str, Captured]) -> Inputs:
    found = {}
    for matrix in place.matrices:
        x = seen[place.local(matrix)].input
        assert x is not None  # the self-test of the hooks has proved that the site is called
        found[matrix.module] = x.flatten(0, -2)
    return found


def _numbers(anatomy: Anatomy) -> int:
    """How many numbers a token's inputs are, in all blocks; those who read the same share them."""
    shared = (("q", "k", "v", "qkv"), ("gate", "up"))
    total = 0
    for block in anatomy.blocks:
        cols = {next((roles for roles in shared if m.role in roles), (m.role,)): m.cols for m in block.matrices}
        total += sum(cols.values())
    return total
