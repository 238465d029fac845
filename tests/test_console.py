"""The console: one plain line a block or one bar, results alone on stdout, a log that never fails."""

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from circuitpress.console import Console, Work, duration, ignore, log, log_to, size, table


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def streams(terminal: bool = False, **options: Any) -> tuple[Console, io.StringIO, io.StringIO]:
    err, out = Terminal() if terminal else io.StringIO(), io.StringIO()
    return Console(err=err, out=out, **options), err, out


def test_one_line_a_block_where_there_is_no_terminal() -> None:
    console, err, out = streams()
    with console.progress("score", 2) as advance:
        for note in ("forward", "priced block 1", "forward", "priced block 0"):
            advance(0.5, note)
    lines = err.getvalue().splitlines()
    assert [line.split()[:2] for line in lines] == [["score", "1/2"], ["score", "2/2"]]
    assert lines[0].endswith("priced block 1")
    assert not out.getvalue()


def test_thirds_add_up_to_whole_blocks() -> None:
    console, err, _ = streams()
    with console.progress("x", 7) as advance:
        for _ in range(21):
            advance(1 / 3, "")
    assert len(err.getvalue().splitlines()) == 7


@pytest.mark.parametrize("total", [3, (10, 20, 70)])
def test_a_bar_on_a_terminal(total: float | tuple[float, ...]) -> None:
    console, err, out = streams(terminal=True)
    with console.progress("apply", total) as advance:
        advance(1, "block 0")
        advance(2, "block 2")
    assert "apply" in err.getvalue()
    assert "3/3" in err.getvalue()
    assert not out.getvalue()


def test_time_left_goes_by_the_work_of_blocks() -> None:
    work = Work((10, 20, 70))
    assert work.left(5.0) is None and work.count() == "0/3"
    work.add(1)
    assert work.left(1.0) == pytest.approx(9.0)  # by blocks it would be 2
    work.add(0.5)
    assert (work.count(), work.done) == ("1/3", 20.0)
    assert work.left(2.0) == pytest.approx(8.0)
    work.add(1.5)
    assert (work.count(), work.done, work.left(9.0)) == ("3/3", 100.0, None)
    work.add(1)  # one more than was announced
    assert (work.count(), work.done) == ("4/3", 100.0)
    alike, unknown = Work(4), Work(None)
    for one in (alike, unknown):
        one.add(1)
    assert (alike.left(2.0), unknown.left(2.0)) == (6.0, None)
    assert (alike.count(), unknown.count()) == ("1/4", "1")


def test_lines_tell_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((0.0, 3.0, 12.0, 12.0))
    monkeypatch.setattr("circuitpress.console.time.monotonic", lambda: next(clock))
    console, err, _ = streams()
    with console.progress("export", (30, 90)) as advance:
        advance(1, "embedding")
        advance(1, "block 0")
    assert err.getvalue().splitlines() == [
        "export    1/2  3.0 s, 9 s left  embedding",
        "export    2/2  12.0 s  block 0",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (99.4, "99 s"), (99.6, "2 min"), (5960, "99 min"), (11100, "3 h 05")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_shows_errors_only(terminal: bool) -> None:
    console, err, _ = streams(terminal=terminal, quiet=True)
    console.say("hello")
    with console.progress("apply", 3) as advance:
        advance(1, "block 0")
    assert not err.getvalue()
    console.fail("broken", "mend it")
    assert err.getvalue() == "error: broken\nnext:  mend it\n"


def test_results_go_to_stdout_as_a_table_or_as_strict_json() -> None:
    console, err, out = streams()
    console.result("a table", {"kl": 1.5})
    assert (out.getvalue(), err.getvalue()) == ("a table\n", "")
    console, _, out = streams(json=True)
    console.result("a table", {"kl": float("nan"), "rows": [{"x": float("inf")}], "path": Path("a/b"), "n": (1, None)})
    expected = {"kl": None, "rows": [{"x": None}], "path": "a/b", "n": [1, None]}
    assert json.loads(out.getvalue(), parse_constant=lambda name: pytest.fail(name)) == expected


def test_a_closed_stderr_ends_nothing() -> None:
    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    console = Console(err=Closed())
    console.say("hello")
    with console.progress("apply", 1) as advance:
        advance(1, "block 0")


def test_the_log_keeps_everything_and_leaves_no_handler(tmp_path: Path) -> None:
    console, _, _ = streams(quiet=True)
    before = list(log.handlers), log.level
    with log_to(tmp_path / "run.log"):
        console.say("hello")
        with console.progress("apply", 1) as advance:
            advance(1, "block 0")
        logging.getLogger("circuitpress.anything").debug("detail")
    assert (list(log.handlers), log.level) == before
    text = (tmp_path / "run.log").read_text()
    for part in ("INFO circuitpress: hello", "apply: +1 block 0", "DEBUG circuitpress.anything: detail"):
        assert part in text


def test_a_log_on_a_full_disk_does_not_stop_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with log_to(tmp_path / "run.log"):
        monkeypatch.setattr("circuitpress.console._LogFile.flush", full)
        log.info("lost")
        monkeypatch.undo()


@pytest.mark.parametrize(("options", "shown"), [({}, 1), ({"quiet": True}, 0), ({"debug": True}, 2)])
def test_warnings_of_the_library_are_shown(options: dict[str, bool], shown: int) -> None:
    console, err, _ = streams(**options)
    with console.listening():
        logging.getLogger("circuitpress.data").warning("careful")
        logging.getLogger("circuitpress.data").debug("detail")
    assert len(err.getvalue().splitlines()) == shown


def test_tables_align_and_stay_within_80_columns() -> None:
    text = table("title", [("", "before", "after"), ("bits", "16.00", "3.0"), ("n" * 200, "1", "2")])
    lines = text.splitlines()
    assert lines[0] == "title"
    assert max(map(len, lines)) == 80
    short = table("t", [("name", "x"), ("a", "10")]).splitlines()
    assert short == ["t", "--------", "name   x", "a     10"]
    assert table("empty", []) == "empty\n-----"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (10_957_216, "10.96 MB"), (2.5e9, "2.50 GB"), (-1500, "-1.50 kB"), (7e12, "7.00 TB")],
)
def test_sizes(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


def test_ignore_takes_anything() -> None:
    assert ignore(1, "x") is None
