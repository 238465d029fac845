"""Windows that a run keeps: read back as they were, made anew when anything that decides them changes."""

from pathlib import Path

import pytest
import torch

from circuitpress.data import Windows
from circuitpress.run.windows import kept_windows

IDS = torch.arange(15).view(3, 5)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    return tmp_path / "model"


def test_a_text_is_tokenised_once(tmp_path: Path, checkpoint: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("one")
    made: list[int] = []

    def load() -> Windows:
        made.append(1)
        return Windows(IDS + len(made), str(text), "text", "digest", 1)

    def ask(length: int = 5) -> Windows:
        return kept_windows(tmp_path / "windows", checkpoint, text, {"length": length}, load)

    first, again = ask(), ask()
    assert made == [1]
    assert torch.equal(first.ids, again.ids)
    assert first.describe() == again.describe()
    ask(length=6)
    assert len(made) == 2
    text.write_text("another")
    ask()
    assert len(made) == 3
    (checkpoint / "tokenizer.json").write_text('{"a": 1}')
    ask()
    assert len(made) == 4
    assert torch.equal(ask().ids, IDS + 4)
