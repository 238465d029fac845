"""What a person sees: progress and messages on stderr, the result alone on stdout.

- On a terminal, one bar with blocks done, the last note and the time left; elsewhere (CI, `2> log`) one plain line a
  block, because a bar in a log file is noise. `--quiet` silences both; errors are still shown. The time left goes by
  the work of blocks (weights, bytes), where they are not all alike.
- `--json` turns the result into one JSON document, so that `circuitpress run ... --json | jq .kl` works.
- `log_to` keeps everything at DEBUG in a file whatever the terminal shows: after a crash it is what there is to read.
"""

import contextlib
import io
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import rich.progress

Advance = Callable[[float, str], None]
"""Called by long work with the blocks done since the last call and a note such as `block 3`."""

log = logging.getLogger("circuitpress")

WIDTH = 80
"""Columns of the tables: what a terminal window has by default."""


def ignore(blocks: float, note: str) -> None:  # noqa: ARG001 (an Advance)
    """The Advance of a caller who does not watch."""


@dataclass(frozen=True)
class Console:
    """Where progress and results go; `err` and `out` stand for the process's stderr and stdout."""

    quiet: bool = False
    json: bool = False
    debug: bool = False
    err: io.TextIOBase | None = None
    out: io.TextIOBase | None = None

    @property
    def stream(self) -> io.TextIOBase:
        """Where progress goes now."""
        return self.err or cast(io.TextIOBase, sys.stderr)

    def say(self, text: str) -> None:
        """One line of progress for people; kept in the log too."""
        log.info(text)
        if not self.quiet:
            self._write(text)

    def fail(self, message: str, hint: str | None = None) -> None:
        """An error and what to do next, shown whatever `quiet` says."""
        self._write(f"error: {message}" + (f"\nnext:  {hint}" if hint else ""))

    def result(self, text: str, document: Mapping[str, object]) -> None:
        """The outcome on stdout: `document` as JSON with --json, else `text`."""
        out = self.out or sys.stdout
        out.write((json.dumps(_strict(document), indent=1) if self.json else text) + "\n")
        out.flush()

    @contextlib.contextmanager
    def progress(self, title: str, total: float | Sequence[float] | None = None) -> Iterator[Advance]:
        """Shows a stage while the context lasts; yields the function that reports blocks.

        `total` is the number of blocks, or the work of each in the order in which they come, such as its weights.
        """
        started = time.monotonic()
        work = Work(total)
        log.info("%s: started", title)
        try:
            if self.quiet:
                yield _logged(title, ignore)
            elif self.stream.isatty():
                with self._bar() as bar:
                    task = bar.add_task(title, total=work.whole, note="", count=work.count())

                    def advance(blocks: float, note: str) -> None:
                        work.add(blocks)
                        bar.update(task, completed=work.done, note=note, count=work.count())

                    yield _logged(title, advance)
            else:
                yield _logged(title, self._lines(title, work, started))
        finally:
            log.info("%s: %.1f s", title, time.monotonic() - started)

    def _bar(self) -> "rich.progress.Progress":
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[note]}", style="dim"),
        )
        return Progress(
            *columns,
            console=RichConsole(file=self.err, stderr=True),  # pyright: ignore[reportArgumentType]
        )

    def _lines(self, title: str, work: "Work", started: float) -> Advance:
        def advance(blocks: float, note: str) -> None:
            before = work.finished
            work.add(blocks)
            if work.finished > before:
                passed = time.monotonic() - started
                left = work.left(passed)
                times = f"{passed:.1f} s" + (f", {duration(left)} left" if left else "")
                self._write(f"{title:<9} {work.count()}  {times}  {note}".rstrip())

        return advance

    def _write(self, text: str) -> None:
        stream = self.stream
        with contextlib.suppress(OSError):  # a closed pipe must not end an hour of work
            stream.write(text + "\n")
            stream.flush()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Shows the library's warnings on stderr while the context lasts (with --debug, everything)."""
        handler = _Relay(self._write)
        handler.setLevel(logging.DEBUG if self.debug else logging.ERROR if self.quiet else logging.WARNING)
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        with _attached(handler):
            yield


class Work:
    """How much of a stage is done: blocks, which people count, and their work, by which time goes."""

    def __init__(self, total: float | Sequence[float] | None) -> None:
        self._steps = tuple(total) if isinstance(total, Sequence) else None
        self.total = len(total) if isinstance(total, Sequence) else total
        self.whole = self.total if self._steps is None else sum(self._steps)
        """The work of all blocks; None if it is not known."""
        self.blocks = 0.0

    def add(self, blocks: float) -> None:
        """Some blocks more, or a part of one."""
        self.blocks += blocks

    @property
    def finished(self) -> int:
        """Whole blocks; thirds add up."""
        return int(self.blocks + 1e-6)

    @property
    def done(self) -> float:
        """The work that is done; a part of a block is that part of its work."""
        if self._steps is None:
            return self.blocks
        whole = self.finished
        part = max(0.0, self.blocks - whole) * (self._steps[whole] if whole < len(self._steps) else 0.0)
        return sum(self._steps[:whole]) + part

    def count(self) -> str:
        """`3/12`."""
        return f"{self.finished}/{self.total:g}" if self.total else f"{self.finished}"

    def left(self, passed: float) -> float | None:
        """Seconds left after `passed` seconds, at the pace until now; None if nobody knows, or all is done."""
        if not self.whole or not self.done or self.done >= self.whole:
            return None
        return passed * (self.whole - self.done) / self.done


def duration(seconds: float) -> str:
    """A time to go in whole numbers: `8 s`, `12 min`, `3 h 05`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d}"


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Appends everything at DEBUG to `path` while the context lasts; a full disk ends the log, not the work."""
    handler = _LogFile(path, encoding="utf-8", delay=True)
    handler.setLevel(logging.DEBUG)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    with _attached(handler):
        yield


def table(title: str, rows: Sequence[tuple[str, ...]]) -> str:
    """Plain columns under a title: the first flush left, the others flush right; lines beyond 80 columns are cut."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows), default=0))]
    lines = [title, "-" * min(WIDTH, max(len(title), sum(widths) + 2 * len(widths) - 2))]
    for first, *rest in rows:
        cells = [first.ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=False)]
        line = "  ".join(cells).rstrip()
        lines.append(line if len(line) <= WIDTH else line[: WIDTH - 1] + "…")
    return "\n".join(lines)


def size(nbytes: float) -> str:
    """Bytes for people: 10_957_216 is `10.96 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def _strict(value: object) -> object:
    """JSON has no NaN and no infinity: they become null, or the document could be read by Python alone."""
    if isinstance(value, Mapping):
        return {str(key): _strict(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


class _Relay(logging.Handler):
    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        self._write(self.format(record))


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, ARG002 (logging's name)
        """Says nothing: logging would print a traceback for every line that no longer fits on the disk."""


@contextlib.contextmanager
def _attached(handler: logging.Handler) -> Iterator[None]:
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        with contextlib.suppress(OSError):
            handler.close()


def _logged(title: str, advance: Advance) -> Advance:
    def both(blocks: float, note: str) -> None:
        log.debug("%s: +%g %s", title, blocks, note)
        advance(blocks, note)

    return both
