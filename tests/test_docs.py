"""The reference is what the code says; recipes and scripts that the documents name are there."""

import re
from pathlib import Path

import pytest
import yaml

from circuitpress.recipe import Recipe

from .scripts import load_script

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def test_the_reference_is_up_to_date() -> None:
    module = load_script("docs/reference.py")
    assert module.render() == module.PAGE.read_text(), "run python docs/reference.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_in_a_page_exist(page: Path) -> None:
    for path in re.findall(r"python ((?:benchmarks|docs)/\w+\.py)", page.read_text()):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_in_a_page_have_known_keys(page: Path) -> None:
    sections = {info.alias or name: info.annotation for name, info in Recipe.model_fields.items()}
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
        document = yaml.safe_load(block)
        assert isinstance(document, dict)
        for key, section in document.items():
            assert key in sections, f"{page.name}: {key}"
            if isinstance(section, dict):
                known = sections[key].model_fields  # pyright: ignore
                assert set(section) <= set(known), f"{page.name}: {section}"
