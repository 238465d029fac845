"""Budgets: every way to write one, and what it leaves for the linear weights."""

import pytest

from circuitpress.errors import RecipeError
from circuitpress.plan import Budget


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3.0bpw", 3 * 1001 // 8),
        ("2.5 bpw", 312),
        ("0.1bpw", 12),
        ("40%", 800),
        ("33%", 660),
        ("100%", 2002),
        ("900MB", 900_000_000 - 77),
        ("1.2GB", 1_200_000_000 - 77),
        ("1.1kB", 1100 - 77),
        ("5000B", 5000 - 77),
        ("2MiB", 2 * 2**20 - 77),
        (".5GiB", 2**29 - 77),
        ("10B", -67),
    ],
)
def test_bytes_for_linear_weights(text: str, expected: int) -> None:
    assert Budget.parse(text).linear_bytes(1001, 77) == expected


def test_arithmetic_is_exact() -> None:
    # 0.29 * 800 is 231.99999999999997 in floating point.
    assert Budget.parse("0.29bpw").linear_bytes(800, 0) == 29
    assert Budget.parse("2.3bpw").linear_bytes(80 * 10**12, 0) == 23 * 10**12


@pytest.mark.parametrize(
    "text", ["", "3", "bpw", "-3bpw", "0bpw", "0.0%", "3bits", "nanbpw", "1e9B", "3bpw 4bpw", "12gb"]
)
def test_what_is_not_a_budget(text: str) -> None:
    with pytest.raises(RecipeError, match="is not a budget") as caught:
        Budget.parse(text)
    assert caught.value.hint is not None
    assert "3.0bpw" in caught.value.hint
