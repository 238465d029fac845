"""The pages in a real browser: nothing in the console, nothing wider than the window, both schemes, without script."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from circuitpress.report import write_audit, write_report

from .chromium import Chromium, find
from .folders import write_audited, write_run

pytestmark = pytest.mark.skipif(
    find() is None, reason="no Chromium here: apt install chromium, or name one in $CHROMIUM (see CONTRIBUTING.md)"
)
PAGES = ("whole", "bare", "tall", "audit")
WIDE = """[...document.querySelectorAll("body *")].filter(node => {
  const box = node.getBoundingClientRect();
  return !node.closest(".scroll, pre, details:not([open])") && (box.right > innerWidth + 0.5 || box.left < -0.5);
}).map(node => node.outerHTML.slice(0, 120))"""
"""What sticks out of the window and cannot be scrolled to by itself; text of figures too."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report with every section and long names, one with hardly any, one of a tall model, and an audit."""
    folder = tmp_path_factory.mktemp("pages")
    whole = write_run(folder / "whole", cut=True)
    row = {
        "task": "arc_easy", "metric": "acc", "reference": 0.5, "value": 0.46, "difference": -0.04,
        "difference_stderr": 0.011, "higher_is_better": True, "documents": 2376, "asked": True,
    }  # fmt: skip
    rows = [row, row | {"task": "mmlu_college_computer_science_continuation", "metric": "acc_norm"}]
    tasks = {"rows": rows, "recovery": 0.92, "provenance": {"lm_eval": "0.4.13"}}
    (whole / "evaluate" / "tasks.json").write_text(json.dumps(tasks))
    behavior = {
        "name": "agreement-across-a-relative-clause", "pairs": 80, "reference_accuracy": 0.98, "accuracy": 0.91,
        "reference_margin": 3.2, "margin": 2.5, "kept": False,
    }  # fmt: skip
    (whole / "evaluate" / "behaviors.json").write_text(json.dumps([behavior]))
    nbytes = json.loads((whole / "evaluate" / "fidelity.json").read_text())["bytes"]
    document = write_audited(nbytes)
    (whole / "audit.json").write_text(json.dumps(document))
    bare = write_run(folder / "bare")
    for name in ("exact.json", "probes.json", "scores.safetensors", "recipe.yaml", "evaluate/fidelity.json"):
        (bare / name).unlink()
    tall = write_run(folder / "tall", blocks=64, heads=40)
    found = {path.name: write_report(path) for path in (whole, bare, tall)}
    return found | {"audit": write_audit(document, folder / "audit" / "audit.html")}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    program = find()
    assert program is not None
    with Chromium(program, tmp_path_factory.mktemp("chromium")) as chromium:
        yield chromium


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_its_window(name: str, width: int, dark: bool, pages: dict[str, Path], browser: Chromium) -> None:
    browser.open(pages[name], width=width, dark=dark)
    assert browser.complaints() == []
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate(WIDE) == []
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(18, 20, 23)" if dark else "rgb(252, 252, 251)")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_without_script(name: str, pages: dict[str, Path], browser: Chromium) -> None:
    browser.open(pages[name], width=390, script=False)
    assert browser.complaints() == []
    shown = browser.evaluate("document.body.innerText")
    sections = browser.evaluate("[...document.querySelectorAll('section')].map(s => [s.id, s.offsetHeight])")
    assert len(sections) > 4 and all(height > 100 for _, height in sections)
    figures = browser.evaluate("[...document.querySelectorAll('.plot')].map(f => f.getBoundingClientRect().height)")
    assert figures and min(figures) > 40
    assert ("0.0312" if name == "audit" else "bits per weight") in shown


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_printed_on_white(name: str, pages: dict[str, Path], browser: Chromium) -> None:
    browser.open(pages[name], width=720, dark=True)
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    browser.call("Emulation.setEmulatedMedia", media="print", features=[dark])
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.evaluate("getComputedStyle(document.body).color") == "rgb(22, 24, 28)"
    assert browser.evaluate(WIDE) == []
    browser.call("Emulation.setEmulatedMedia", media="")


def test_more_of_a_table_can_be_scrolled_to(pages: dict[str, Path], browser: Chromium) -> None:
    browser.open(pages["audit"], width=390)
    hidden = "(s => s.scrollWidth - s.clientWidth)(document.querySelector('#behaviors .scroll'))"
    assert browser.evaluate(hidden) > 20
    assert browser.evaluate("document.querySelector('#behaviors td').getBoundingClientRect().right < innerWidth")


def test_an_error_in_a_page_would_be_noticed(tmp_path: Path, browser: Chromium) -> None:
    path = tmp_path / "bad.html"
    head = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    path.write_text(head + '<img src="missing.png"><script>nothing.there</script><p style="width: 900px">wide</p>')
    browser.open(path, width=700)
    complaints = " ".join(browser.complaints())
    assert "missing.png" in complaints and "nothing is not defined" in complaints
    assert len(browser.evaluate(WIDE)) == 1 and browser.evaluate("document.documentElement.scrollWidth") > 700
    browser.open(path, width=390)  # a phone zooms out instead
    assert browser.evaluate("innerWidth") > 390
