"""An interrupt is told as one, whatever became of its exception on the way."""

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from circuitpress.cli import invoke
from circuitpress.interrupt import interrupts


@pytest.fixture(autouse=True)
def python_handles_interrupts() -> Iterator[None]:
    """Started in the background by a shell, this process ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def swallow(*_: object, **__: object) -> None:
    """What compiled code does that calls Python: the exception under way is replaced by another."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape") from None


def test_an_error_after_an_interrupt_is_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("circuitpress.run.run_recipe", swallow)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: here\n")
    assert invoke(["run", str(recipe)]) == 130
    assert "error: interrupted\nnext:  the same command again" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_without_one_is_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("a shape")

    monkeypatch.setattr("circuitpress.run.run_recipe", fail)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: here\n")
    assert invoke(["run", str(recipe)]) == 1
    assert "error: ValueError: a shape" in capsys.readouterr().err


def test_the_interrupt_is_raised_all_the_same() -> None:
    with interrupts() as came:
        assert not came()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert came()


def test_other_threads_and_other_handlers_are_left_alone() -> None:
    seen: list[bool] = []

    def work() -> None:
        with interrupts() as came:
            seen.append(came())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
    own = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, own)
