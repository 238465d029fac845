"""Pages whose commands are really run, in order, on the demo checkpoint: what they print and their exit codes hold.

In such a page, an indented line that begins with a program is run; `# exit 3` behind it is its exit code (else 0), and
each line `# text` below it is found in what it prints. Blocks of Python are executed. The run that the pages begin with
is made once; each goes on in a copy.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from circuitpress import formats
from circuitpress.cli import invoke

ROOT = Path(__file__).parents[1]
PAGES = ("complaints", "choose-a-budget", "small-machines", "extend")
PROGRAMS = ("circuitpress", "cp", "grep", "pytest", "time")


@dataclass
class Command:
    """A line of a page and what it says of the outcome."""

    line: str
    code: int = 0
    prints: list[str] = field(default_factory=list)


def steps(page: str) -> list[Command | str]:
    """The commands and the blocks of Python of a page, in order."""
    found: list[Command | str] = []
    block: list[str] | None = None
    for line in (ROOT / "docs" / f"{page}.md").read_text().splitlines():
        if block is not None:
            if line == "```":
                found.append("\n".join(block))
                block = None
            else:
                block.append(line)
        elif line == "```python":
            block = []
        elif line.startswith("    # "):
            assert isinstance(last := found[-1], Command)
            last.prints.append(line[6:])
        elif line.startswith("    ") and re.sub(r"^(\w+=\S+ )+", "", line[4:]).split()[0] in PROGRAMS:
            command, _, code = line.strip().partition("# exit ")
            found.append(Command(command.strip(), int(code or 0)))
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the recipes, a few documents of a task, and the run that the pages begin with."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    data = folder / "data" / "llm-foundry"
    data.mkdir(parents=True)
    row = '{"context": "The dog ran after the ball and the cat ran after the", "continuation": "dog"}\n'
    (data / "lambada_openai.jsonl").write_text(3 * row)
    assert invoke(["run", str(folder / "recipes" / "try.yaml"), "--out", str(folder / "runs" / "try"), "--quiet"]) == 0
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of it for one page."""
    return Path(shutil.copytree(made, tmp_path / "page", symlinks=True))


def run(command: Command, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and output; in this process where it can be, since importing torch takes longer than most commands."""
    words = shlex.split(command.line)
    if words[0] == "time":
        words = words[1:]
    if words[0] == "pytest":
        assert all((ROOT / word).exists() for word in words[1:])  # the suite runs it
        return 0, ""
    if words[0] == "circuitpress":
        capfd.readouterr()
        code = invoke(words[1:])
        return code, "\n".join(capfd.readouterr())
    variables = dict(word.split("=", 1) for word in words if re.fullmatch(r"[A-Z_]+=\S+", word))
    words = words[len(variables) :]
    if words[0] == "circuitpress":
        words = [sys.executable, "-m", *words]
    done = subprocess.run(words, env=os.environ | variables, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_a_page_holds(
    page: str, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    names: dict[str, Any] = {"re": re, "__name__": "page"}
    found = steps(page)
    assert any(isinstance(step, Command) for step in found)
    for step in found:
        if isinstance(step, Command):
            holds(step, *run(step, capfd))
        elif step.startswith("(re.compile("):  # a row of the table of formats
            monkeypatch.setattr(formats, "_TABLE", (*formats._TABLE, eval(step, names)))  # noqa: S307 (our own page)
        else:
            exec(compile(step, page, "exec"), names)  # noqa: S102


def holds(command: Command, code: int, printed: str) -> None:
    """What was printed and the exit code are what the page says."""
    assert code == command.code, f"{command.line}\n{printed[-2000:]}"
    flat = " ".join(printed.split())
    for text in command.prints:
        assert " ".join(text.split()) in flat, f"{command.line}\ndoes not print: {text}\n{printed[-2000:]}"
