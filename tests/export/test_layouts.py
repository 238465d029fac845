"""What is written, compared with the packages that read it: words, levels, scales, importance, names of tensors."""

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from circuitpress.anatomy import read_anatomy
from circuitpress.export import absmax, packed
from circuitpress.export.gguf import importance, read_imatrix, tensor_name, tensor_types, write_imatrix, write_types
from circuitpress.formats import AbsmaxCodes, AbsmaxFormat, IntCodes, IntFormat, parse
from circuitpress.plan.serving import Stored


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("cols", [1, 31, 32, 45, 64])
def test_words_are_those_of_compressed_tensors(bits: int, cols: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(2**bits, (5, cols), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(packed.pack_words(codes, bits), pack_to_int32(signed, bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_compressed_tensors_decodes_what_we_decode(dtype: torch.dtype) -> None:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    form = parse("sym4g32")
    assert isinstance(form, IntFormat)
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (7, 96), generator=draw, dtype=torch.uint8)
    scales = form.round_scales(torch.rand(7, 3, generator=draw) * 1e-2)
    value = IntCodes(codes, scales, torch.full((7, 3), 8, dtype=torch.uint8))
    scheme = QuantizationScheme(targets=["Linear"], weights={"num_bits": 4, "strategy": "group", "group_size": 32})  # pyright: ignore
    stored = packed.encode(form, value, dtype)
    stored["weight_scale"] = stored["weight_scale"].float()
    found = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
    assert torch.equal(found, form.decode(value))


def random_absmax(name: str, rows: int, cols: int) -> tuple[AbsmaxFormat, AbsmaxCodes]:
    form = parse(name)
    assert isinstance(form, AbsmaxFormat)
    draw = torch.Generator().manual_seed(1)
    codes = torch.randint(len(form.levels), (rows, cols), generator=draw, dtype=torch.uint8)
    return form, AbsmaxCodes(codes, torch.rand(rows, -(-cols // form.width(cols)), generator=draw))


def test_bitsandbytes_decodes_what_we_decode() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="the extra bnb is not installed")
    form, value = random_absmax("nf4", 5, 192)
    assert torch.equal(form.levels, functional.get_4bit_type("nf4", device="cpu"))
    tensors = absmax.encode(form, value, torch.float32)
    state = functional.QuantState.from_dict(
        {f"weight.{name}" if "." not in name else name: t for name, t in tensors.items() if name != "weight"},
        torch.device("cpu"),
    )
    assert torch.equal(functional.dequantize_4bit(tensors["weight"], state), form.decode(value))
    form, value = random_absmax("llmint8", 5, 45)
    tensors = absmax.encode(form, value, torch.float32)
    found = functional.int8_vectorwise_dequant(tensors["weight"], tensors["SCB"])
    assert torch.equal(found, form.decode(value))


def test_importance_reads_back_and_has_llama_cpps_names(llama: Path, tmp_path: Path) -> None:
    anatomy = read_anatomy(llama)
    draw = np.random.default_rng(0)
    matrices = {
        (block.index, m): draw.random(m.cols, dtype=np.float32) for block in anatomy.blocks for m in block.matrices
    }
    diagonals = {m.module: values * 1e-9 for (_, m), values in matrices.items()}
    write_imatrix(anatomy, diagonals, tmp_path / "i.gguf", windows=3, length=17, text="a text")
    found = read_imatrix(tmp_path / "i.gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for (layer, matrix), values in matrices.items():
        assert tensor_name(layer, matrix) == f"{names.get_name(matrix.module)}.weight"
        np.testing.assert_allclose(found[tensor_name(layer, matrix)], values / values.mean(), rtol=1e-5)
    assert len(found) == len(matrices)
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "imatrix" and fields["imatrix.datasets"] == ["a text"]
    assert fields["imatrix.chunk_count"] == 3 and fields["imatrix.chunk_size"] == 17
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes["blk.1.ffn_down.weight.in_sum2"] == [128, 1] and shapes["blk.1.ffn_down.weight.counts"] == [1, 1]


def test_importance_of_nothing_is_even() -> None:
    assert importance(np.zeros(3, dtype=np.float32)).tolist() == [1, 1, 1]
    assert importance(np.array([np.nan, 1], dtype=np.float32)).tolist() == [1, 1]
    assert importance(np.array([0, 2], dtype=np.float32)).tolist() == pytest.approx([1e-6, 2])


def test_every_line_of_types_matches_one_tensor(llama: Path, tmp_path: Path) -> None:
    anatomy = read_anatomy(llama)
    forms = ("int4g32", "int5g32", "sym8g32", "float32")
    matrices = [m for block in anatomy.blocks for m in block.matrices]
    stored = {m.module: Stored((forms[i % 4],), m.rows, m.cols) for i, m in enumerate(matrices)}
    types = tensor_types(anatomy, stored)
    write_types(types, tmp_path / "types.txt")
    lines = [line.split("=") for line in (tmp_path / "types.txt").read_text().split()]
    assert len(lines) == 14
    others = ["blk.11.attn_q.weight", "blk.0.attn_q_norm.weight", "blk.0.attn_norm.weight", "output.weight"]
    for pattern, kind in lines:
        (name,) = [name for name in [*types, *others] if re.search(pattern, name)]
        assert types[name] == kind and kind.upper() in gguf.GGMLQuantizationType.__members__
