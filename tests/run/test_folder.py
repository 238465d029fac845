"""Run folders: foreign ones, locks, full disks; nothing of the user's is ever touched."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from circuitpress.console import Console
from circuitpress.errors import CircuitpressError
from circuitpress.recipe import Recipe
from circuitpress.run import replan, run_recipe
from circuitpress.run.folder import full_disk_is_an_error, open_folder, require_space

Digests = Callable[[Path], dict[str, str]]
Forbid = Callable[..., None]


@pytest.mark.parametrize("name", ["thesis.tex", "manifest.json", "model"])
def test_a_folder_of_something_else_is_refused_untouched(
    recipe: Recipe, tmp_path: Path, name: str, console: Console
) -> None:
    out = tmp_path / "mine"
    (out / name).mkdir(parents=True) if name == "model" else [out.mkdir(), (out / name).write_text("{}")]
    for restart in (False, True):
        with pytest.raises(CircuitpressError, match=f"is not a run of circuitpress: it holds .*{name}"):
            run_recipe(recipe, out, console, restart=restart)
    assert [path.name for path in out.iterdir()] == [name]


def test_a_file_in_place_of_the_folder(recipe: Recipe, tmp_path: Path, console: Console) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CircuitpressError, match="is a file, not a run folder"):
        run_recipe(recipe, tmp_path / "file", console)


def test_a_damaged_manifest_is_an_error_not_a_new_run(recipe: Recipe, copy: Path, console: Console) -> None:
    (copy / "manifest.json").write_text("{")
    with pytest.raises(CircuitpressError, match="manifest.json cannot be read"):
        run_recipe(recipe, copy, console, restart=True)
    assert (copy / "model").exists()


def test_steps_need_the_steps_before(tmp_path: Path, copy: Path, console: Console) -> None:
    with pytest.raises(CircuitpressError, match="no such run folder"):
        replan(tmp_path / "nothing", console, budget=None, target=None, protect=(), front=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CircuitpressError, match="is not a run folder"):
        replan(tmp_path / "empty", console, budget=None, target=None, protect=(), front=False)
    with open_folder(copy, create=False) as folder:
        folder.forget("score")
    with pytest.raises(CircuitpressError, match="the stage score is not finished") as caught:
        replan(copy, console, budget=None, target=None, protect=(), front=False)
    assert str(caught.value.hint).startswith("circuitpress score ")


HOLD = """
import signal, sys
from pathlib import Path
from circuitpress.run.folder import open_folder
with open_folder(Path(sys.argv[1]), create=True):
    sys.stdout.write("ready")
    sys.stdout.flush()
    signal.pause()
"""


def test_two_runs_on_one_folder_and_a_lock_that_dies_with_its_holder(
    recipe: Recipe, copy: Path, console: Console
) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, copy], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.read(5) == b"ready"
        with pytest.raises(CircuitpressError, match=rf"is in use by another circuitpress \(process {holder.pid}\)"):
            run_recipe(recipe, copy, console)
        holder.kill()
    run_recipe(recipe, copy, console)


def test_a_full_disk_names_the_folder_and_keeps_what_is_finished(
    recipe: Recipe,
    copy: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    console: Console,
    digests: Digests,
    forbid: Forbid,
) -> None:
    replan(copy, console, budget="6bpw", target=None, protect=(), front=False)
    replan(copy, console, budget="5bpw", target=None, protect=(), front=False)
    real = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if "block-00001" in path.name:
            real(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(CircuitpressError, match="No space left on device|is full") as caught:
            run_recipe(recipe, copy, console)
    assert "finished stages are kept" in str(caught.value.hint)
    assert not list(copy.glob("**/*.partial*"))
    forbid("price.price", "probe.exact", "probe.probe")
    run_recipe(recipe, copy, console)
    assert digests(copy / "model") == digests(finished / "model")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        OSError("131072 requested and 4096 written"),
    ],
)
def test_every_shape_of_a_full_disk(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("circuitpress.run.folder.free_bytes", lambda _: 1_000_000)
    with (
        pytest.raises(CircuitpressError, match=r"the disk of .* is full: 1.00 MB are free"),
        full_disk_is_an_error(tmp_path),
    ):
        raise error
    with pytest.raises(ValueError, match="other"), full_disk_is_an_error(tmp_path):
        raise ValueError("other")


def test_too_little_space_is_said_before_any_work(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console, forbid: Forbid
) -> None:
    monkeypatch.setattr("circuitpress.run.folder.free_bytes", lambda _: 1000)
    forbid()
    with pytest.raises(CircuitpressError, match="needs about .* 1.00 kB are free on its disk"):
        run_recipe(recipe, tmp_path / "new" / "run", console)
    monkeypatch.undo()
    require_space(tmp_path / "new" / "run", 1, {"model": 1})
