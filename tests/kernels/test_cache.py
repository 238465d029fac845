"""Packed caches: what is stored, what a number may be off by, and the kernel that reads it."""

import importlib.util

import pytest
import torch

from circuitpress_kernels.kv import (
    WIDTHS,
    CacheForm,
    bytes_of_a_token,
    bytes_with_scales,
    head_table,
    pack_cache,
    read_cache,
    read_cache_twin,
)

from .processes import lines

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton has wheels for Linux only")


def numbers(heads: int, tokens: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers [2, heads, tokens, dim], one channel of which is large, and one the same for all tokens."""
    generator = torch.Generator().manual_seed(heads + dim)
    found = torch.randn(2, heads, tokens, dim, generator=generator)
    found[..., 0] += 50
    found[..., -1] = 3
    return found.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [6, 64])
def test_a_number_is_off_by_half_a_step_at_most(dim: int, dtype: torch.dtype) -> None:
    form = CacheForm(WIDTHS, dim, 16)
    x = numbers(len(WIDTHS), 48, dim, dtype)
    rows = pack_cache(x, form)
    read = read_cache_twin(rows, form, torch.float32) if dtype != torch.bfloat16 else read_cache_twin(rows, form, dtype)
    groups = x.double().view(2, len(WIDTHS), 3, 16, dim)
    reach = (groups.amax(3) - groups.amin(3))[:, :, :, None].expand_as(groups).reshape(x.shape)
    for head, bits in enumerate(WIDTHS):
        error = (read[:, head].double() - x[:, head].double()).abs()
        rounding = x[:, head].double().abs() * (2.0**-8 if dtype == torch.bfloat16 else 2.0**-10)
        step = reach[:, head] / (2**bits - 1) if bits < 16 else 0 * rounding
        assert bool((error <= 0.51 * step + rounding + 1e-7).all()), bits
    assert torch.equal(read[:, -1].to(dtype), x[:, -1].half().to(dtype) if dtype == torch.float32 else x[:, -1])


def test_bytes_are_those_of_the_tensors() -> None:
    form = CacheForm((3, 16, 4, 2), 10, 32)
    rows = pack_cache(numbers(4, 96, 10, torch.float16), form)
    assert rows.codes.shape == (2, 96, bytes_of_a_token(form)) == (2, 96, 4 + 20 + 5 + 3)
    assert sum(tensor.nbytes for tensor in rows) == 2 * 96 * bytes_with_scales(form)
    assert head_table(form).tolist() == [[3, 0, 0], [16, 4, 1], [4, 24, 1], [2, 29, 2]]


def test_codes_lie_in_bytes_one_after_another() -> None:
    form = CacheForm((3,), 8, 2)
    x = torch.stack([torch.zeros(8), torch.full((8,), 7.0)])[None, None]
    x[0, 0, 0, 2] = 7.0  # the whole channel is 7: its code is 0
    rows = pack_cache(x, form)
    word = sum(7 << (3 * channel) for channel in range(8) if channel != 2)
    assert rows.codes.tolist() == [[[0, 0, 0], [word & 255, word >> 8 & 255, word >> 16]]]
    assert torch.equal(read_cache_twin(rows, form, torch.float32), x)


def test_tokens_fill_groups() -> None:
    with pytest.raises(ValueError, match="33 tokens do not fill groups of 32"):
        pack_cache(torch.zeros(1, 1, 33, 4), CacheForm((4,), 4, 32))


def test_the_operator_is_the_twin_and_has_a_shape_for_the_compiler() -> None:
    form = CacheForm((4, 16, 3), 10, 16)
    rows = pack_cache(numbers(3, 32, 10, torch.float16), form)
    table = head_table(form)
    assert torch.equal(read_cache(rows, form, table, torch.float16), read_cache_twin(rows, form, torch.float16))
    arguments = (*rows, table, list(form.bits), 10, 16, torch.float16)
    torch.library.opcheck(torch.ops.circuitpress.read_cache.default, arguments)
    fake = torch.ops.circuitpress.read_cache(*(t.to("meta") for t in (*rows, table)), *arguments[3:])
    assert fake.shape == (2, 3, 32, 10) and fake.dtype == torch.float16


@needs_triton
def test_interpreted_kernel_matches_the_twin() -> None:
    found = lines("cache_cases.py", "cpu", TRITON_INTERPRET="1")
    assert len(found) == 6
    assert not [line for line in found if not (line["right_form"] and line["beyond"] <= 1)]


@pytest.mark.gpu
@needs_triton
def test_kernel_on_a_gpu_matches_the_twin() -> None:
    assert not [line for line in lines("cache_cases.py", "cuda") if not (line["right_form"] and line["beyond"] <= 1)]
