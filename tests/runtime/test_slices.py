"""Stored matrices in the layout of the GPU kernels: every format decodes to what it stands for, none is refused."""

import pytest
import torch
from torch import Tensor

from circuitpress.formats import Format, decode_segments, parse
from circuitpress.runtime.descriptor import Descriptor
from circuitpress.runtime.linear import PackedLinear
from circuitpress.runtime.slices import to_slices
from circuitpress_kernels import BOOK, DENSE, TRELLIS, slice_linear, slice_weight
from circuitpress_kernels.slices import SPARSE

INTEGERS = [f"int{bits}g{group}" for bits in range(2, 9) for group in (32, 200)]
EXACT = [*INTEGERS, "int4g64s6", "int3g32+0.5%", "int7g64+0.1%", "code2", "code3", "code4g32", "code3r16g64", "float16"]
ROUNDED = ["int4g40", "int3g24+0.5%", "code4g40", "trellis2", "trellis2.5", "trellis2l10", "float32"]


def stored(form: Format, rows: int, cols: int) -> dict[str, Tensor]:
    """Random flat tensors of a format."""
    generator = torch.Generator().manual_seed(rows + cols)
    found = {}
    for name, (dtype, count) in form.layout(rows, cols).items():
        if name == "outlier_steps":  # evenly spaced
            found[name] = torch.full((count,), rows * cols // count - 1 - (1 << 15), dtype=dtype)
        elif name == "trellis_base":
            found[name] = torch.tensor([0.5, 0.02], dtype=dtype)
        elif dtype.is_floating_point:
            found[name] = (0.01 + torch.rand(count, generator=generator)).to(dtype)
        else:
            found[name] = torch.randint(0, 5 if dtype == torch.int8 else 256, (count,), generator=generator).to(dtype)
    return found


def laid_out(
    axis: str, segments: list[tuple[str, int, int]], rows: int, cols: int, dtype: torch.dtype, *, turned=False
):
    """(matrix in slices, or with `turned` what `to_slices` returns; its weights float32)."""
    cut = [{"format": name, "start": start, "stop": stop} for name, start, stop in segments]
    descriptor = Descriptor.from_json("m", {"shape": [rows, cols], "axis": axis, "segments": cut})
    flat: dict[str, list[Tensor]] = {}
    for part in descriptor.parts:
        for name, tensor in stored(part.format, part.rows, part.cols).items():
            flat.setdefault(name, []).append(tensor)
    tensors = {name: torch.cat(pieces) for name, pieces in flat.items()}
    weight = decode_segments(tensors, (rows, cols), axis, cut)
    sliced = to_slices(descriptor, tensors, dtype=dtype)
    return (sliced if turned else sliced.matrix), weight


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("axis", ["rows", "cols"])
def test_what_fits_is_exact(name: str, axis: str) -> None:
    length = 140 if axis == "rows" else 172
    segments = [(name, 0, 64), ("int4g32", 64, 96), (name, 96, length)]
    matrix, weight = laid_out(axis, segments, 140, 172, torch.float16)
    assert torch.equal(slice_weight(matrix), weight)
    kinds = {kind for kind in range(24) if matrix.form.kinds >> kind & 1}
    form = parse(name)
    bits = getattr(getattr(form, "base", form), "bits", 0)
    wanted = {"i": 8 if bits == 7 else bits, "c": BOOK + bits, "f": DENSE}[name[0]]
    assert kinds - {4} == {wanted} - {4} | ({SPARSE} if "+" in name else set())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ROUNDED)
def test_everything_else_is_kept_in_16_bits(name: str, dtype: torch.dtype) -> None:
    matrix, weight = laid_out("rows", [(name, 0, 60), ("int2g32", 60, 71)], 71, 172, dtype)
    found = slice_weight(matrix)
    assert torch.equal(found[:60], weight[:60].to(dtype).float())
    assert torch.equal(found[60:], weight[60:])


@pytest.mark.parametrize("axis", ["rows", "cols"])
@pytest.mark.parametrize("name", [f"trellis{half / 2:g}" for half in range(3, 9)])
def test_a_trellis_stays_one_and_meets_rotated_activations(name: str, axis: str) -> None:
    other = ("int4g32+0.5%", 64, 128)
    sliced, weight = laid_out(axis, [(name, 0, 64), other, (name, 128, 224)], 224, 224, torch.float16, turned=True)
    matrix, turned, strips = sliced
    assert matrix.form.kinds >> (TRELLIS + round(2 * float(name.removeprefix("trellis")))) & 1
    assert turned.spans == (((0, 224), (0, 224)) if axis == "rows" else ((0, 64), (128, 224)))
    # The scales of rows are rounded to 16 bits; rotating back sums up to 128 weights in float32.
    found = turned.fold(slice_weight(matrix), strips)
    assert (found - weight).norm() / weight.norm() < 2**-11
    x = torch.randn(3, 224, generator=torch.Generator().manual_seed(0)).half()
    exact = x.double() @ weight.double().T
    y = slice_linear(turned.extend(x, strips), matrix).double()
    assert (y - exact).norm() / exact.norm() < 2e-3


def test_a_module_on_a_trellis_turns_its_inputs() -> None:
    segments = [{"format": "trellis2", "start": 0, "stop": 64}, {"format": "int4g32", "start": 64, "stop": 80}]
    descriptor = Descriptor.from_json("m", {"shape": [80, 160], "axis": "rows", "segments": segments})
    first, second = descriptor.parts
    parts = [stored(part.format, part.rows, part.cols) for part in (first, second)]
    tensors = {name: torch.cat([part[name] for part in parts if name in part]) for name in descriptor.layout()}
    module = PackedLinear(descriptor, bias=False)
    module.load_state_dict(tensors)
    weight = module.dequantize()
    module.repack(torch.float16, slices=True)
    assert (module.dequantize() - weight).norm() / weight.norm() < 2**-11
    x = torch.randn(2, 3, 160).half()
    exact = x.double() @ weight.double().T
    assert (module(x).double() - exact).norm() / exact.norm() < 2e-3
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), module(x), rtol=1e-2, atol=1e-2)


def test_a_matrix_is_read_in_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    from circuitpress.runtime import descriptor

    for axis in ("rows", "cols"):
        segments = [("int4g32", 0, 96), ("int3g32", 96, 172)]
        whole, weight = laid_out(axis, segments, 172, 172, torch.float16)
        monkeypatch.setattr(descriptor, "_STRIPE", 1)
        striped, _ = laid_out(axis, segments, 172, 172, torch.float16)
        monkeypatch.undo()
        assert torch.equal(slice_weight(striped), weight)
        assert all(torch.equal(a, b) for a, b in zip(whole[:-1], striped[:-1], strict=True))
