"""Drafts of trellis formats: as far from the weights, and in the same directions, as what encoding gives."""

import pytest
import torch

from circuitpress.formats import TrellisFormat, parse
from circuitpress.quantize import quantize_everywhere
from circuitpress.quantize.draft import draft_trellis


def matrix(rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights with unequal rows, and a Hessian of strongly correlated inputs."""
    torch.manual_seed(cols)
    mix = torch.randn(cols, cols) * torch.linspace(0.05, 1.0, cols)
    x = torch.randn(4 * cols, cols) @ mix
    return torch.randn(rows, cols) * torch.linspace(0.5, 2.0, rows)[:, None], x.T @ x / len(x)


def loss(change: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(((change @ hessian) * change).sum())


@pytest.mark.parametrize(("name", "rows", "cols"), [("trellis2l10", 96, 64), ("trellis3l10", 64, 45)])
def test_the_weighted_error_is_that_of_encoded_weights(name: str, rows: int, cols: int) -> None:
    weight, hessian = matrix(rows, cols)
    encoded = quantize_everywhere(weight, hessian, [name])[0][name].decode()
    drafted = quantize_everywhere(weight, hessian, [name], draft=True)[0][name].decode()
    ratio = loss(drafted - weight, hessian) / loss(encoded - weight, hessian)
    assert 0.75 < ratio < 1.35


def test_other_formats_are_rounded_as_always_and_the_order_is_kept() -> None:
    weight, hessian = matrix(20, 48)
    names = ["int3g16", "trellis2l10", "float32"]
    drafts = quantize_everywhere(weight, hessian, names, draft=True)[0]
    rounded = quantize_everywhere(weight, hessian, names)[0]
    assert list(drafts) == names
    for name in ("int3g16", "float32"):
        assert torch.equal(drafts[name].decode(), rounded[name].decode())


def test_drafts_repeat_and_shrink_with_bits() -> None:
    weight, hessian = matrix(32, 48)
    forms = [form for name in ("trellis2", "trellis3", "trellis4") if isinstance(form := parse(name), TrellisFormat)]
    first, note = draft_trellis(weight, hessian, forms)
    again, _ = draft_trellis(weight, hessian, forms)
    assert note == ""
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    errors = [loss(draft - weight, hessian) for draft in first]
    assert errors[0] > 2.5 * errors[1] > 6 * errors[2]
