"""The refined folder replaces the old one whole, or not at all."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from circuitpress.refine.write import RECORD, write_refined


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(3), "b": torch.ones(2)}, folder / "one.safetensors", metadata={"format": "pt"})
    save_file({"c": torch.zeros(4)}, folder / "two.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder


def test_only_what_changed_is_written(model: Path) -> None:
    untouched = (model / "two.safetensors").stat().st_ino
    write_refined(model, {"a": torch.arange(3.0)}, {"steps": 4})
    assert torch.equal(load_file(model / "one.safetensors")["a"], torch.arange(3.0))
    assert torch.equal(load_file(model / "one.safetensors")["b"], torch.ones(2))
    assert (model / "two.safetensors").stat().st_ino == untouched
    assert json.loads((model / RECORD).read_text()) == {"steps": 4}
    assert {path.name for path in model.iterdir()} == {"one.safetensors", "two.safetensors", "config.json", RECORD}
    assert not list(model.parent.glob(".*"))


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"d": torch.zeros(3)}, "stores no tensor d"),
        ({"a": torch.zeros(4)}, r"a was torch.float32 \[3\], is torch.float32 \[4\]"),
        ({"a": torch.zeros(3).half()}, "is torch.float16"),
    ],
)
def test_what_does_not_fit_leaves_the_folder_as_it_was(
    model: Path, tensors: dict[str, torch.Tensor], problem: str
) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    with pytest.raises(ValueError, match=problem):
        write_refined(model, tensors, {})
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
