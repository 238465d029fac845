"""The how-to pages: every command in them parses, names files that exist, and the recipe runs on a small scale."""

import json
import re
import shlex
from pathlib import Path

import click
import pytest

from circuitpress.cli import cli, invoke

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
COMMANDS = [
    (page.name, line.strip())
    for page in PAGES
    if page.name != "reference.md"  # shows how commands are called, and their examples, which test_cli.py tries
    for line in page.read_text().splitlines()
    if line[:16] == "    circuitpress"
]
"""Name of the page, command."""


def test_there_are_commands() -> None:
    assert COMMANDS


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_of_a_page_parses(page: str, line: str) -> None:
    del page
    _, name, *rest = shlex.split(line, comments=True)
    found = cli.commands[name]
    if isinstance(found, click.Group):
        found, rest = found.commands[rest[0]], rest[1:]
    found.make_context(name, rest)
    for word in rest:
        if word.startswith("recipes/"):
            assert (ROOT / word).exists(), word


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_exist(page: Path) -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_the_recipe_keeps_what_it_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On little text: the demo checkpoint, its own two behaviors, judged on the other half of the pairs."""
    small = ["data.samples=4", "data.length=64", "evaluate.windows=2", "score.exact=0", "plan.budget=3.2bpw"]
    small += ["plan.formats=[int2g64s6,int4g64s6,int8]"]
    settings = [word for setting in small for word in ("--set", setting)]
    recipe = str(ROOT / "recipes" / "keep-behaviors.yaml")
    code = invoke(["run", recipe, *settings, "--out", str(tmp_path / "run"), "--json", "--quiet"])
    document = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in document["behaviors"]}
    assert set(rows) == {"agreement", "reflexives"}
    assert all(row["reference_accuracy"] > 0.8 for row in rows.values())
    assert code == (0 if all(row["kept"] for row in rows.values()) else 4)
    assert document["bits_per_weight"] <= 3.2
