"""The documents show what benchmarks/results hold, and name only commands, files and options that there are."""

import re
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest
import yaml

from circuitpress.cli import cli
from circuitpress.recipe import known_keys

from .scripts import load_script

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MEASURED = (ROOT / "docs" / "measurements.md").read_text()


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return load_script("benchmarks/tables.py")


def test_every_figure_comes_from_a_results_file(tables: ModuleType) -> None:
    assert tables.fill(README) == README
    assert tables.fill(MEASURED) == MEASURED
    marked = re.findall(r"<!-- results:(\w+) -->", README + MEASURED)
    assert sorted(marked) == sorted(tables.BLOCKS)


def test_an_outdated_table_is_noticed(tables: ModuleType) -> None:
    changed = re.sub(r"\*\*[\d.]+\*\*", "**0.5**", README, count=1)
    assert changed != README
    assert tables.fill(changed) == README


def test_commands_in_the_readme_exist() -> None:
    named = set(re.findall(r"^    circuitpress ([\w-]+)(.*)$", README, re.MULTILINE))
    assert {command for command, _ in named} >= {"check", "run", "score", "plan", "apply", "eval", "report", "diff"}
    for command, rest in named:
        found = cli.commands[command]
        if command == "lm-eval":  # the harness's own options
            continue
        if isinstance(found, click.Group):
            found = found.commands[rest.split()[0]]
        options = {option for parameter in found.params for option in parameter.opts}
        assert set(re.findall(r"--\w[\w-]*", rest.split("#")[0])) <= options, command


def test_scripts_and_links_exist() -> None:
    scripts = re.findall(r"python (benchmarks/\w+\.py)", README + MEASURED)
    links = re.findall(r"\]\(([\w./-]+)\)", README)
    links += [f"docs/{path}" for path in re.findall(r"\]\(([\w./-]+)\)", MEASURED)]
    for path in scripts + links:
        assert (ROOT / path).exists(), path


def test_the_recipe_in_the_readme_has_known_keys() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    document = yaml.safe_load(block)
    keys = {f"{section}.{key}" for section, keys in document.items() if isinstance(keys, dict) for key in keys}
    assert "plan.budget" in keys and keys <= set(known_keys())


def test_the_python_in_the_readme_compiles() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    compile(block, "README.md", "exec")
    assert sys.version_info >= (3, 11)
