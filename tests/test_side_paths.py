"""benchmarks/side_paths.py: exact on its directions, no better path of a rank than the best, and every byte counted."""

from pathlib import Path
from types import ModuleType

import click
import pytest
import torch
from torch import Tensor

from circuitpress.hooks import weight_of
from circuitpress.price import load_hessians, price
from circuitpress.rounding import decoded_in_place, round_block
from circuitpress.stream import open_stream

from .scripts import load_script
from .whole import linears, load, tokens, weight

SITE = 0


@pytest.fixture(scope="module")
def paths() -> ModuleType:
    """The script as a module (benchmarks/ is no package)."""
    return load_script("benchmarks/side_paths.py")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Gaussian numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def second_moment(cols: int) -> Tensor:
    """A Hessian with a wide spectrum."""
    x = drawn(200, cols, seed=3) * torch.logspace(0, -2, cols, dtype=torch.float64) @ drawn(cols, cols, seed=4)
    return x.T @ x / 200


@pytest.mark.parametrize(("rows", "cols", "rank"), [(7, 11, 1), (13, 5, 3), (6, 6, 6)])
def test_exact_on_the_directions_and_unchanged_beside_them(paths: ModuleType, rows: int, cols: int, rank: int) -> None:
    original, rounded, directions = drawn(rows, cols), drawn(rows, cols).round(), drawn(rank, cols, seed=1)
    basis = paths.orthonormal(directions, rank)
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-14)
    result = rounded + paths.read_side(original - rounded, basis, torch.float64)
    torch.testing.assert_close(result @ directions.T, original @ directions.T, rtol=0, atol=1e-12)
    outside = drawn(4, cols, seed=2)
    outside = outside - outside @ torch.linalg.pinv(directions) @ directions
    torch.testing.assert_close(result @ outside.T, rounded @ outside.T, rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(result - rounded) == rank


def test_directions_that_repeat_others_take_no_rank(paths: ModuleType) -> None:
    one, two, three = drawn(3, 9)
    basis = paths.orthonormal(torch.stack([one, -2 * one, two, one + two, three]), 3)
    inside = basis @ basis.T
    torch.testing.assert_close(inside @ three, three)
    assert basis.shape == (9, 3)


@pytest.mark.parametrize("rank", [1, 4])
def test_no_path_of_its_rank_leaves_less_than_the_best(paths: ModuleType, rank: int) -> None:
    error, hessian = drawn(8, 10), second_moment(10)
    root = torch.linalg.cholesky(hessian)

    def left(side: Tensor) -> float:
        return float(((error - side) @ root).square().sum())

    best = left(paths.best_side(error, hessian, rank, torch.float64))
    assert best == pytest.approx(float(torch.linalg.svdvals(error @ root)[rank:].square().sum()), rel=1e-9)
    top = torch.linalg.eigh(hessian).eigenvectors[:, -rank:]
    for basis in (top, paths.orthonormal(drawn(rank, 10, seed=5), rank)):
        kept = left(paths.read_side(error, basis, torch.float64))
        assert best < kept
        freed = paths.freed_of(hessian, basis)  # what the rounding is told is what the path leaves
        assert kept == pytest.approx(float((error @ freed * error).sum()), rel=1e-9)


def test_matrices_read_features_through_the_gain_of_their_norm(
    paths: ModuleType, tiny_llama: Path, tmp_path: Path
) -> None:
    stream, ids, directions = open_stream(tiny_llama), tokens(4, 9), drawn(3, 48, seed=6)
    _, prices = price(stream, ids, formats=("int2g16",), folder=tmp_path)
    place = stream.anatomy.blocks[1]
    hessians = load_hessians(tmp_path, place, stream.device)
    layout = {group.segments[0].module: ("rows", [("int2g16", 0, group.segments[0].rows)]) for group in prices.groups}
    with stream.block(1) as module, torch.no_grad():
        gains = {"q": module.input_layernorm.weight, "up": module.post_attention_layernorm.weight}
        for seed, gain in enumerate(gains.values()):
            gain.copy_(drawn(48, seed=7 + seed).abs() + 0.1)
        rounded = decoded_in_place(round_block(module, place, layout, hessians, None), place, None)
        for kind in ("features", "features" + paths.FOR_IT):
            found = paths.with_path(module, place, layout, rounded, hessians, directions, 3, kind, 0)
            assert sorted(found) == sorted(place.local(m) for m in place.matrices if m.role not in ("o", "down"))
            for role, gain in gains.items():
                name, read = place.local(place.role(role)), (directions * gain.double()).T
                wanted = weight_of(module, place, place.role(role)).double() @ read
                scale = float(wanted.norm())
                assert float((found[name].double() @ read - wanted).norm()) < 2e-3 * scale  # float16
                assert float((rounded[name].double() @ read - wanted).norm()) > 0.05 * scale
        whole = paths.with_path(module, place, layout, rounded, hessians, directions, 48, "random", 0)
        for matrix in place.matrices:
            if place.local(matrix) in whole:
                original = weight_of(module, place, matrix)
                torch.testing.assert_close(whole[place.local(matrix)], original, rtol=0, atol=5e-3)


def test_rows_count_every_byte(paths: ModuleType, tiny_llama: Path, tmp_path: Path) -> None:
    stream, ids = open_stream(tiny_llama), tokens(4, 9)
    _, prices = price(stream, ids, formats=("int2g16", "int4g16", "int8g16"), folder=tmp_path)
    rows = paths.side_paths(
        stream, ids, tokens(3, 9, seed=1), drawn(5, 48), SITE, prices=prices, shards=tmp_path,
        budgets=(6.0, 3.2), ranks=(2,), seeds=2,
    )  # fmt: skip
    matrices = {name: weight(module) for name, module in linears(load(tiny_llama)).items()}
    read = [
        m for name, m in matrices.items() if ".layers.0." not in name and not name.endswith(("o_proj", "down_proj"))
    ]
    expected = 16 * 2 * sum(sum(m.shape) for m in read) / sum(m.numel() for m in matrices.values())
    large = [row for row in rows if row["budget"] == "6bpw"]
    assert [row["method"] for row in large[:3]] == ["bits", "no path", "best"]
    assert len(large) == 1 + 2 + 2 * 4
    assert [row["method"] for row in rows if row["budget"] == "3.2bpw"] == ["bits"]  # the path alone would take 2.7
    for row in large:
        assert row["bits_per_weight"] <= 6.0
        assert row["side_bits"] == pytest.approx(expected if row["rank"] else 0.0)
    assert {row["against_bits"] for row in rows if not row["rank"]} == {0.0}


def test_other_blocks_are_refused(paths: ModuleType, tiny_gpt2: Path, tmp_path: Path) -> None:
    stream, ids = open_stream(tiny_gpt2), tokens(2, 5)
    _, prices = price(stream, ids, formats=("int2g16",), folder=tmp_path)
    with pytest.raises(click.UsageError, match=r"Llama's kind: this model has no gate, k, q, v"):
        paths.side_paths(
            stream, ids, ids, drawn(3, stream.anatomy.hidden), SITE, prices=prices, shards=tmp_path,
            budgets=(6.0,), ranks=(1,), seeds=1,
        )  # fmt: skip
