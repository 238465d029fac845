"""What matrices read, kept by a forward walk or seen by running a block again."""

from pathlib import Path

import pytest
import torch

from circuitpress.anatomy import Anatomy
from circuitpress.score.inputs import KeptInputs, matrix_inputs
from circuitpress.stream import Stream, forward, open_stream

from ..whole import MODELS, tokens


def kept_of(stream: Stream, first: int, room: int) -> KeptInputs:
    batches = stream.batches(tokens(5, 6))
    found = KeptInputs(stream, batches, first, room)
    forward(stream, batches, stream.store("x"), around=found.watch)
    return found


def bytes_kept(found: KeptInputs, anatomy: Anatomy) -> int:
    storages = {}
    for block in anatomy.blocks:
        for b in range(9):
            for x in (found.take(block.index, b) or {}).values():
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("name", MODELS)
def test_a_walk_keeps_what_a_block_reads(name: str, request: pytest.FixtureRequest) -> None:
    stream = open_stream(request.getfixturevalue(name), batch_tokens=12)
    found = kept_of(stream, 1, 1 << 30)
    batches = stream.batches(tokens(5, 6))
    store = stream.store("again")
    forward(stream, batches, store, keep=True)
    for place in stream.anatomy.blocks:
        assert found.take(place.index, 0) is None  # before the first one asked for
        with stream.block(place.index) as module:
            for b in (1, 2):
                kept = found.take(place.index, b)
                again = matrix_inputs(stream, module, place, store.get((place.index, b)))
                assert kept is not None
                assert list(kept) == list(again) == [matrix.module for matrix in place.matrices]
                for matrix in place.matrices:
                    assert kept[matrix.module].shape == (len(batches[b]) * 6, matrix.cols)
                    torch.testing.assert_close(kept[matrix.module], again[matrix.module], rtol=0, atol=0)
                assert found.take(place.index, b) is None  # handed out once


@pytest.mark.parametrize("name", MODELS)
def test_all_blocks_fit_or_none_is_kept(name: str, request: pytest.FixtureRequest) -> None:
    """The room that is asked for is what is taken, to the byte."""
    folder: Path = request.getfixturevalue(name)
    stream = open_stream(folder, batch_tokens=12)
    size = bytes_kept(kept_of(stream, 1, 1 << 30), stream.anatomy)
    assert size > 0
    assert bytes_kept(kept_of(stream, 1, size), stream.anatomy) == size
    assert bytes_kept(kept_of(stream, 1, size - 1), stream.anatomy) == 0
