"""Packed embeddings: rows are those of the decoded matrix, tied heads share one store, casts are refused."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from circuitpress.errors import CircuitpressError
from circuitpress.runtime.descriptor import Descriptor
from circuitpress.runtime.embedding import PackedEmbedding, share, tied_head

Segments = Sequence[tuple[str, int, int]]
Packer = Callable[[Tensor, str, Segments], tuple[dict[str, Tensor], Tensor]]
ROWS, COLS = 37, 40
IDS = torch.tensor([[0, 36, 5], [5, 17, 1]])


def make(packer: Packer, segments: Segments, *, axis: str = "rows", cols: int = COLS) -> tuple[PackedEmbedding, Tensor]:
    """A stored embedding, and the matrix float32 that it stands for."""
    weight = torch.randn(ROWS, cols, generator=torch.Generator().manual_seed(0))
    flat, decoded = packer(weight, axis, segments)
    cut = [{"format": form, "start": start, "stop": stop} for form, start, stop in segments]
    descriptor = Descriptor.from_json("embed", {"shape": [ROWS, cols], "axis": axis, "segments": cut})
    module = PackedEmbedding(descriptor)
    for name, tensor in flat.items():
        module.get_buffer(name).copy_(tensor)
    return module, decoded


CASES = [
    ([("int8g64", 0, ROWS)], "rows", COLS, "rows"),
    ([("int4g16", 0, ROWS)], "rows", COLS, "rows"),
    ([("int3g40", 0, ROWS)], "rows", COLS, "rows"),
    ([("int5g24", 0, ROWS)], "rows", COLS, "rows"),
    ([("int3g16", 0, ROWS)], "rows", 41, "dense"),  # 123 bits a row
    ([("int4g16", 0, 20), ("int8g16", 20, ROWS)], "rows", COLS, "dense"),
    ([("int4g16", 0, 16), ("int2g8", 16, COLS)], "cols", COLS, "dense"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("segments", "axis", "cols", "form"), CASES)
def test_rows_are_those_of_the_decoded_matrix(
    segments: Segments, axis: str, cols: int, form: str, dtype: torch.dtype, matrix_packer: Packer
) -> None:
    module, decoded = make(matrix_packer, segments, axis=axis, cols=cols)
    assert torch.equal(module(IDS), decoded[IDS])
    module.repack(dtype)
    assert module.form == form
    rows = module(IDS)
    assert rows.dtype == dtype
    assert torch.equal(rows, decoded[IDS].to(dtype))
    assert module(torch.tensor(3)).shape == (cols,)
    assert module(torch.zeros(0, dtype=torch.long)).shape == (0, cols)


def test_rows_take_the_bytes_of_their_codes(matrix_packer: Packer) -> None:
    module, _ = make(matrix_packer, [("int4g20", 0, ROWS)])
    module.repack(torch.bfloat16)
    assert sum(buffer.nbytes for buffer in module.buffers()) == ROWS * (COLS // 2 + 2 * 3)


@pytest.mark.parametrize(("dtype", "form"), [(torch.float32, "dense"), (torch.bfloat16, "int4pack")])
def test_a_tied_head_shares_the_store(dtype: torch.dtype, form: str, matrix_packer: Packer) -> None:
    module, decoded = make(matrix_packer, [("int4g32", 0, ROWS)], cols=64)
    head = tied_head(module.descriptor)
    assert not list(head.state_dict())
    share(module, head)
    assert head.stored["weight"].data_ptr() == module.stored["weight"].data_ptr()
    head.repack(dtype)
    assert head.form == form
    module.repack(dtype, head=head)
    if form == "dense":
        assert module.get_buffer("weight").data_ptr() == head.get_buffer("weight").data_ptr()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    error = (head(x).double() - x.double() @ decoded.double().T).abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 0.3)
    assert torch.equal(module(IDS), decoded[IDS].to(dtype))


def test_what_would_spoil_the_codes_is_refused(matrix_packer: Packer) -> None:
    module, _ = make(matrix_packer, [("int8g64", 0, ROWS)])
    module.repack(torch.float32)
    with pytest.raises(CircuitpressError, match="cannot become torch.bfloat16"):
        module.to(torch.bfloat16)
    with pytest.raises(CircuitpressError, match="repacked as rows and dropped"):
        _ = module.stored
    assert "formats=int8g64, form=rows" in repr(module)
    dense, _ = make(matrix_packer, [("int3g16", 0, ROWS)], cols=41)
    dense.repack(torch.float32)
    assert dense.to(torch.bfloat16)(IDS).dtype == torch.bfloat16
