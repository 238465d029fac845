"""Which licence a base has, and what it asks of a repository."""

from pathlib import Path

import pytest

from circuitpress.hub import Terms, terms_of
from circuitpress.hub.licence import front_matter


def test_the_card_goes_before_the_licence_file(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("MIT License\n\nPermission is hereby granted")
    assert terms_of(tmp_path).licence == "mit"
    (tmp_path / "README.md").write_text("---\nlicense: llama3.2\n---\n# x\n")
    assert terms_of(tmp_path).licence == "llama3.2"
    assert terms_of(tmp_path, licence="gemma").licence == "gemma"
    (tmp_path / "README.md").write_text("---\nlicense: other\n---\n")
    assert terms_of(tmp_path).licence == "mit", "`other` says nothing"


def test_the_first_folder_that_says_any_counts(tmp_path: Path) -> None:
    first, second = tmp_path / "model", tmp_path / "base"
    for folder in (first, second):
        folder.mkdir()
    (second / "LICENSE.txt").write_text("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n...")
    assert terms_of(first, second).licence == "llama3.1"
    assert terms_of(first) == Terms(None)


@pytest.mark.parametrize(
    ("licence", "name", "files", "count"),
    [
        ("llama3.1", "my-model", ("config.json",), 2),
        ("llama3.1", "Llama-3.1-8B-3bit", ("LICENSE",), 0),
        ("llama3.1", "llama-tiny", ("LICENSE.txt",), 0),
        ("llama3", "Llama-3-8B", ("LICENSE",), 0),
        ("llama3", "Llama-8B", ("LICENSE",), 1),
        ("apache-2.0", "x", (), 1),
        ("mit", "x", (), 0),
    ],
)
def test_names_and_copies_that_licences_ask_for(
    licence: str, name: str, files: tuple[str, ...], count: int, tmp_path: Path
) -> None:
    assert len(terms_of(tmp_path, licence=licence).problems(name, files)) == count


def test_front_matter_of_odd_cards(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    for text in ("# no front matter\n", "---\nbroken: [\n---\n", "---\n- a list\n---\n", ""):
        card.write_text(text)
        assert front_matter(card) == {}
    assert front_matter(tmp_path / "missing.md") == {}
