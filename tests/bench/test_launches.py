"""Launches: the fastest wins if it wins by enough, tables add up, and without a GPU the command says so."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from circuitpress.bench.launches import CANDIDATES, best, on_gpu, save, tune
from circuitpress.cli import invoke
from circuitpress.errors import CircuitpressError
from circuitpress_kernels import launches
from circuitpress_kernels.launches import Launch, Situation, choose, default, forced, read, situation

GPU = "NVIDIA Test 1"
SHAPES = [(4096, 4096), (4096, 2048), (2048, 4096)]
KINDS = {"int3g64": 1 << 3, "int4g64": 1 << 4, "bfloat16": None}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(launches.FILE, str(tmp_path / "deep" / "launches.json"))
    launches.tables.cache_clear()
    yield tmp_path / "deep" / "launches.json"
    launches.tables.cache_clear()


def test_tuning_finds_what_the_timer_likes_and_keeps_it(file: Path) -> None:
    liked = {8: Launch(12, 2, 4), 32: Launch(12, 4, 2)}
    asked: list[tuple[str, tuple[int, int], int, Launch]] = []

    def timer(name: str, shape: tuple[int, int], rows: int, launch: Launch) -> float | None:
        asked.append((name, shape, rows, launch))
        if launch.warps == 1:
            return None
        # The quicker launch at many rows has programs that few rows did not choose.
        return 1e-5 * (0.5 if (rows, launch) == (32, Launch(3, 2, 2)) else 0.8 if launch == liked[rows] else 1.0)

    found = tune(SHAPES, list(KINDS), device=GPU, timer=timer, kinds_of=lambda name, _: KINDS[name])
    sizes = {(4096 * 4096).bit_length(), (4096 * 2048).bit_length()}
    assert found == {
        Situation(GPU, kinds, rows, size): liked[rows] for kinds in (8, 16) for rows in (8, 32) for size in sizes
    }
    assert {launch for *_, rows, launch in asked if rows == 8} == {*CANDIDATES, default(8), default(16)}
    assert {launch.programs for *_, rows, launch in asked if rows == 32} == {12}
    assert choose(GPU, 16, rows=1, weights=4096**2) == default(16)
    assert save(found) == file
    assert read(file) == found
    assert choose(GPU, 16, rows=1, weights=4096**2) == liked[8]
    assert choose(GPU, 16 | 1 << 1, rows=9, weights=4096**2) == liked[32], "scattered pieces change nothing"
    assert choose("another", 16, rows=1, weights=4096**2) == default(16)
    assert choose(GPU, 16, rows=1, weights=4096) == default(16)


def test_what_was_measured_before_stays_unless_measured_again(file: Path) -> None:
    one, two = (situation(GPU, kinds, rows=1, weights=100) for kinds in (4, 16))
    save({one: Launch(3, 2, 2), two: Launch(3, 2, 3)})
    save({two: Launch(6, 1, 2)})
    assert read(file) == {one: Launch(3, 2, 2), two: Launch(6, 1, 2)}
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_the_best_launch_gains_enough_over_all_shapes() -> None:
    usual, fast, odd, partial = Launch(6, 2, 3), Launch(6, 2, 4), Launch(6, 4, 2), Launch(6, 1, 2)
    times: dict[Launch, list[float | None]] = {usual: [1.0, 10.0], fast: [0.95, 9.6], odd: [0.5, 16.0]}
    assert best(times | {partial: [0.1, None]}, usual) == fast
    assert best({usual: [1.0, 10.0], fast: [0.99, 9.9]}, usual) == usual
    assert best({usual: [None], fast: [None]}, usual) == usual


def test_a_forced_launch_holds_inside_only() -> None:
    with forced(Launch(1, 1, 1)):
        assert choose(GPU, 16, rows=1, weights=1) == Launch(1, 1, 1)
    assert choose(GPU, 16, rows=1, weights=1) == default(16)


def test_defaults_are_candidates() -> None:
    assert {default(1 << kind) for kind in (2, 3, 4, 8)} <= set(CANDIDATES)
    assert default(1 << 3).stages == default((1 << 3) | (1 << 8)).stages == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"launches": [{"device": "a"}]}'])
def test_a_broken_table_names_its_file_and_what_to_do(text: str, tmp_path: Path) -> None:
    path = tmp_path / "launches.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"launches\.json is no table of launches .* --tune"):
        read(path)


def test_without_a_gpu_the_command_says_so(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CircuitpressError, match="none to time"):
        on_gpu("cpu")
    assert invoke(["bench", "kernels", str(tiny_llama), "--tune", "--device", "cpu"]) == 1
    assert "next:  circuitpress bench kernels MODEL --save times.json" in capsys.readouterr().err
