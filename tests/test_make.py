"""The commands that the documents promise, and the versions that they install."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(name): version
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
    for name, version in [line.split("==")]
}
# Each CUDA build of torch requires its own triton, so a pin would make the installation impossible for most users.
UNPINNED = {"triton"}

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def plan(*arguments: str, cwd: Path = ROOT) -> str:
    """What make would run."""
    command = ["make", "--dry-run", "--always-make", "--file", str(ROOT / "Makefile"), *arguments]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


@needs_make
def test_each_target_makes_the_environment_first() -> None:
    for target, command in {
        "demo": "circuitpress run recipes/quickstart.yaml",
        "test": "pytest",
        "lint": "pyright",
    }.items():
        lines = plan(target)
        assert lines.index("pip install") < lines.index(f"bin/{command}")


@needs_make
def test_torch_goes_first_and_may_come_from_an_index_of_its_own() -> None:
    torch, rest = (line for line in plan("venv").splitlines() if "pip install" in line)
    assert torch.rstrip().endswith(" torch") and "-e '.[dev]'" in rest
    assert all("-c constraints.txt" in line for line in (torch, rest))
    torch, rest = (line for line in plan("venv", "TORCH_INDEX=INDEX").splitlines() if "pip install" in line)
    assert torch.endswith("torch --index-url INDEX") and "INDEX" not in rest


def test_the_documents_name_targets_that_there_are() -> None:
    targets = set(re.search(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())
    for document in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"^ *make (\w+)|`make (\w+)", (ROOT / document).read_text(), re.MULTILINE))
        assert {first or second for first, second in named} <= targets


def test_the_check_from_a_fresh_clone_is_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "make test"


@pytest.mark.parametrize("text", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]])
def test_what_ci_installs_is_pinned_within_the_bounds(text: str) -> None:
    requirement = Requirement(text)
    name = canonicalize_name(requirement.name)
    assert [bound.operator for bound in requirement.specifier] == [">="], "lower bounds only"
    if name not in UNPINNED:
        assert requirement.specifier.contains(PINS[name])


def test_pins_are_versions_and_nothing_else() -> None:
    assert all(re.fullmatch(r"[\w.]+", version) for version in PINS.values())
    assert not set(PINS) & {"circuitpress", *UNPINNED}


def test_the_entry_point_answers_without_torch() -> None:
    code = (
        "import sys; from circuitpress.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as done: assert not done.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert PROJECT["scripts"]["circuitpress"] == "circuitpress.cli:main"
