"""PackedLinear: which form each matrix takes, what it computes there, what it refuses."""

import pytest
import torch
from torch import Tensor, nn

from circuitpress.errors import CircuitpressError
from circuitpress.runtime.descriptor import Descriptor
from circuitpress.runtime.linear import PackedLinear, packed_linears

CASES = [
    # axis, segments, rows, cols, form in bfloat16
    ("rows", [("int4g32", 0, 70)], 70, 192, "int4pack"),
    ("rows", [("int2g64", 0, 7), ("int3g64", 7, 8), ("int4g64", 8, 70)], 70, 192, "int4pack"),
    ("cols", [("int4g32", 0, 64), ("int2g32", 64, 192)], 70, 192, "int4pack"),
    ("cols", [("int4g64", 0, 32), ("int4g64", 32, 192)], 70, 192, "dense"),  # groups of the second part do not line up
    ("rows", [("int4g32", 0, 35), ("int4g64", 35, 70)], 70, 192, "dense"),
    ("rows", [("int4g64", 0, 70)], 70, 172, "dense"),
    ("rows", [("int4g16", 0, 70)], 70, 192, "dense"),
    ("rows", [("int8g64", 0, 70)], 70, 192, "int4pack"),
    ("rows", [("int5g64", 0, 9), ("int2g64", 9, 30), ("int7g64", 30, 70)], 70, 192, "int4pack"),
    (
        "cols",
        [("int4g32", 0, 64), ("int6g32", 64, 128), ("int3g32", 128, 160), ("int8g32", 160, 192)],
        70,
        192,
        "int4pack",
    ),
    ("rows", [("int4g64", 0, 69), ("bfloat16", 69, 70)], 70, 171, "dense"),
]


@pytest.fixture
def build(matrix_packer):
    """`build(axis, segments, rows, cols)` -> (module with its stored tensors and a bias, weights float32)."""

    def build(axis: str, segments: list, rows: int, cols: int, dtype: torch.dtype) -> tuple[PackedLinear, Tensor]:
        torch.manual_seed(0)
        flat, decoded = matrix_packer(torch.randn(rows, cols).bfloat16(), axis, segments)
        cut = [{"format": name, "start": start, "stop": stop} for name, start, stop in segments]
        descriptor = Descriptor.from_json("m", {"shape": [rows, cols], "axis": axis, "segments": cut})
        module = PackedLinear(descriptor, bias=True, dtype=dtype, device="meta").to_empty(device="cpu")
        module.load_state_dict(flat | {"bias": torch.randn(rows)})
        return module, decoded

    return build


@pytest.mark.parametrize(("axis", "segments", "rows", "cols", "form"), CASES)
def test_float32_is_exact_in_every_form(axis, segments, rows, cols, form, build) -> None:
    del form
    module, weight = build(axis, segments, rows, cols, torch.float32)
    x = torch.randn(2, 3, cols)
    expected = nn.functional.linear(x, weight, module.bias)
    assert torch.equal(module.dequantize(), weight)
    assert torch.equal(module(x), expected)
    module.repack(torch.float32)
    assert module.form == "dense"
    assert torch.equal(module.dequantize(), weight)
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize(("axis", "segments", "rows", "cols", "form"), CASES)
def test_bfloat16_takes_the_fast_form_where_there_is_one(axis, segments, rows, cols, form, build) -> None:
    module, weight = build(axis, segments, rows, cols, torch.bfloat16)
    module.repack(torch.bfloat16)
    assert module.form == form
    # Rounding a scale to bfloat16, or a weight, is 2^-9; the offset of a group as much of at most 8 scales of 4 bits.
    # Two planes are both rounded, and their sum.
    planes = 2 if hasattr(module, "where") else 1
    assert (module.dequantize() - weight).abs().max() <= planes * 2**-9 * 2.1 * weight.abs().max()
    x = torch.randn(2, 3, cols).bfloat16()
    y, exact = module(x), nn.functional.linear(x.double(), weight.double(), module.bias.double())
    assert y.shape == (2, 3, rows) and y.dtype == torch.bfloat16
    assert (y - exact).norm() / exact.norm() < 2**-8
    assert torch.equal(module(x[0, 0]), module(x)[0, 0]) or form == "dense"
    assert module(x[:0]).shape == (0, 3, rows)


def test_only_wide_rows_have_a_second_plane(build) -> None:
    module, _ = build("rows", [("int8g64", 0, 64), ("int4g64", 64, 256)], 256, 256, torch.bfloat16)
    module.repack(torch.bfloat16)
    assert module.get_buffer("weight").nbytes == 256 * 128
    assert module.get_buffer("upper").nbytes == 64 * 128


def test_int4_takes_a_quarter_of_bfloat16(build) -> None:
    module, _ = build("rows", [("int3g64", 0, 128)], 128, 256, torch.bfloat16)
    module.repack(torch.bfloat16)
    assert sum(buffer.nbytes for buffer in module.buffers()) == 128 * 256 // 2 + 128 * 4 * 4
    assert "formats=int3g64, form=int4pack" in repr(module)


def test_outputs_need_no_gradient_mode(build) -> None:
    module, _ = build("rows", [("int4g32", 0, 64)], 64, 64, torch.bfloat16)
    module.repack(torch.bfloat16)
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(module(x.clone().requires_grad_()).detach(), module(x))


def test_what_a_packed_form_would_not_survive_is_refused(build) -> None:
    module, _ = build("rows", [("int4g32", 0, 64)], 64, 64, torch.bfloat16)
    with pytest.raises(CircuitpressError, match="weights packed for cpu \\(stored\\) cannot become torch.float32"):
        module.to(torch.float32)
    module.repack(torch.bfloat16)
    assert module.to("cpu") is module
    with pytest.raises(CircuitpressError, match="cannot become torch.float32 on cpu"):
        module.float()
    with pytest.raises(CircuitpressError, match="int4pack.* on meta") as caught:
        module.to("meta")
    assert "device_map" in (caught.value.hint or "")
    with pytest.raises(CircuitpressError, match="repacked as int4pack"):
        module.repack(torch.bfloat16)


def test_dense_forms_move_freely_and_modules_are_found(build) -> None:
    module, weight = build("rows", [("int8g32", 0, 64)], 64, 64, torch.float32)
    module.repack(torch.float32)
    assert torch.equal(module.to(torch.bfloat16).dequantize(), weight.bfloat16().float())
    assert packed_linears(nn.Sequential(nn.ReLU(), module)) == {"1": module}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("axis", "segments", "rows", "cols", "form"), CASES)
def test_slices_take_every_matrix(axis, segments, rows, cols, form, dtype, build) -> None:
    del form
    module, weight = build(axis, segments, rows, cols, dtype)
    module.bias.data = module.bias.data.to(dtype)
    module.repack(dtype, slices=True)
    assert module.form == "slices"
    # Integers are exact; what is stored in 16 bits becomes the compute type.
    assert (module.dequantize() - weight).abs().max() <= torch.finfo(dtype).eps / 2 * weight.abs().max()
    x = torch.randn(2, 3, cols).to(dtype)
    exact = nn.functional.linear(x.double(), weight.double(), module.bias.double())
    y = module(x)
    assert y.shape == (2, 3, rows) and y.dtype == dtype
    assert (y - exact).norm() / exact.norm() < torch.finfo(dtype).eps
    assert module(x[0, 0]).shape == (rows,)
    assert module(x[:0]).shape == (0, 3, rows)


@pytest.mark.parametrize("form", ["dense", "int4pack", "slices"])
def test_every_form_compiles_without_graph_breaks(form: str, build) -> None:
    dtype = torch.float32 if form == "dense" else torch.bfloat16
    first, _ = build("rows", [("int4g32", 0, 30), ("int8g32", 30, 64)], 64, 96, dtype)
    second, _ = build("cols", [("int3g32", 0, 32), ("int4g32", 32, 64)], 48, 64, dtype)
    for module in (first, second):
        module.bias.data = module.bias.data.to(dtype)
        module.repack(dtype, slices=form == "slices")
        assert module.form == form
    model = nn.Sequential(first, nn.SiLU(), second)
    x = torch.randn(5, 96).to(dtype)
    with torch.no_grad():
        for backend in ("eager", "aot_eager"):
            torch._dynamo.reset()
            assert torch.equal(torch.compile(model, fullgraph=True, backend=backend)(x), model(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("axis", "segments", "rows", "cols", "form"), CASES)
def test_gpu_forms_match_float64(axis, segments, rows, cols, form, dtype, build) -> None:
    del form
    module, weight = build(axis, segments, rows, cols, dtype)
    module = module.cuda()
    module.repack(dtype)
    assert module.form == ("dense" if dtype == torch.float32 else "slices")
    for batch in (1, 5, 20, 40):
        x = torch.randn(batch, cols, dtype=dtype, device="cuda")
        exact = nn.functional.linear(x.double(), weight.double().cuda(), module.bias.double())
        assert (module(x) - exact).norm() / exact.norm() < 2 * torch.finfo(dtype).eps + 1e-6
