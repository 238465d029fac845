"""`inspect` and its figures: every view on Llama and GPT-2; json and page say what each of them cannot prove."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from circuitpress.cli import invoke
from circuitpress.mech.lens.figures import draw
from circuitpress.mech.lens.inspect import CANNOT_PROVE, VIEWS


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_every_view(
    name: str, request: pytest.FixtureRequest, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = request.getfixturevalue(name), tmp_path / "look"
    options = ["--windows", "6", "--length", "24", "--text", str(text_file), "--out", str(out), "--quiet", "--json"]
    assert invoke(["inspect", str(folder), *options]) == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document["views"]) == list(VIEWS)
    for view in VIEWS:
        found = json.loads((out / f"{view}.json").read_text())
        assert found["evidence"] == document["views"][view]["evidence"] == "correlational"
        assert found["cannot_prove"] == CANNOT_PROVE[view]
        page = ElementTree.parse(out / f"{view}.svg").getroot()
        assert page.tag.endswith("svg")
        comments = (out / f"{view}.svg").read_text()
        assert CANNOT_PROVE[view].split()[0] in comments
    heads = json.loads((out / "attention.json").read_text())["heads"]
    assert len(heads) == 3 * (6 if name == "tiny_llama" else 5)
    assert sorted(path.name for path in out.iterdir()) == sorted(f"{v}.{k}" for v in VIEWS for k in ("json", "svg"))


def test_chosen_views_and_units(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "look"
    options = ["--what", "text", "--unit", "L2.neuron.51", "--unit", "L0.head.5", "--text", str(text_file)]
    assert invoke(["inspect", str(tiny_llama), "--out", str(out), "--quiet", "--windows", "4", *options]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["text.json", "text.svg"]
    parts = json.loads((out / "text.json").read_text())["parts"]
    assert [part["part"] for part in parts] == ["L2.neuron.51", "L0.head.5"]
    for part in parts:
        assert part["top"][0]["value"] == part["top"][0]["values"][part["top"][0]["peak"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--what", "lens,dreams"], "there is no view 'dreams'"),
        (["--unit", "L0.soul.1"], "'L0.soul.1' is not a unit"),
    ],
)
def test_bad_input(
    options: list[str], message: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["inspect", str(tiny_llama), "--out", str(tmp_path / "x"), *options]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err
    assert "\nnext:  " in err


def test_a_figure_is_the_same_bytes_twice(tmp_path: Path) -> None:
    document: dict[str, Any] = {
        "view": "lens", "model": "m", "evidence": "correlational", "cannot_prove": "nothing at all",
        "depths": [{"blocks": i, "kl": 2.0 - i, "kl_stderr": 0.1, "top1_agreement": i / 2} for i in range(3)],
    }  # fmt: skip
    for name in ("a.svg", "b.svg"):
        draw(document, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    draw(document, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
