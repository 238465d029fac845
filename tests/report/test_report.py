"""The report page: what it says, that it stands alone, and what it says when files are missing."""

import json
import re
import shutil
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest

from circuitpress.errors import CircuitpressError
from circuitpress.report import write_report
from circuitpress.report.svg import BITS, BRIGHT, HEATS
from circuitpress.units import Plan

from .folders import write_audited, write_run

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Checker(HTMLParser):
    """Reads a page strictly: tags nest, ids are unique; keeps what the tests ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.figures: list[dict[str, str | None]] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self._note(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else in line {self.getpos()[0]}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.references += re.findall(r"#([\w-]+)", f"{values.get('href', '')} {values.get('clip-path', '')}")
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "svg":
            self.figures.append(values)


def read(path: Path) -> Checker:
    checker = Checker()
    checker.feed(path.read_text(encoding="utf-8"))
    checker.close()
    assert checker.open == []
    return checker


def words(path: Path) -> str:
    return re.sub(r"\s+", " ", " ".join(read(path).words))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "little", cut=True)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "little"))


def test_the_page_holds_the_figures_of_the_run(run: Path) -> None:
    text = words(write_report(run))
    plan = Plan.load(run / "plan.json")
    fidelity = json.loads((run / "evaluate" / "fidelity.json").read_text())
    expected = [
        f"some-lab/little-llama at {plan.bits_per_weight:.2f} bits per weight",
        f"{plan.predicted_kl:.3g}", f"{plan.predicted_kl_corrected:.3g}", "0.0412", "± 0.00087", "91.3%",
        "14.022", "13.471", "+4.1%", f"{plan.linear_bytes / 1e3:.1f} kB", f"{fidelity['bytes'] / 1e3:.0f} kB",
        "0.93", "1.05", "72 interventions", "Not drawn, with a KL of zero or below: 1", "<stories>.txt",
        "model.layers.0.self_attn.q_proj:protected", 'from_pretrained("little/model")', "5.0 min", "abababababababab",
    ]  # fmt: skip
    assert [part for part in expected if part not in text] == []
    assert f"{plan.predicted_kl / 0.0412 - 1:+.0%}" in text


def test_the_page_stands_alone_and_is_sound(run: Path) -> None:
    path = write_report(run)
    page = read(path)
    assert len(page.ids) == len(set(page.ids))
    assert set(page.references) <= set(page.ids)
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//\w+\.\w|@import|url\((?!#)|<script|<link|<img|\ssrc=", source)
    assert not [value for name, value in page.attributes if name.startswith("on")]
    assert "/models/" not in source
    assert len(source) < 150_000


def test_figures_are_described_and_take_their_colours_from_the_page(run: Path) -> None:
    path = write_report(run)
    page = read(path)
    labels = [figure["aria-label"] for figure in page.figures]
    assert len(labels) == len(set(labels)) == 6
    assert all(figure["role"] == "img" and "width" not in figure for figure in page.figures)
    svg = "".join(re.findall(r"<svg.*?</svg>", path.read_text(encoding="utf-8"), re.DOTALL))
    assert set(re.findall(r"(?:fill|stroke):(?!none)([^;\"]*)", svg)) == set(re.findall(r"var\(--\w+\)", svg))
    known = set(re.findall(r"(--\w+):", path.read_text(encoding="utf-8")))
    assert {name[4:-1] for name in re.findall(r"var\(--\w+\)", svg)} <= known


def test_the_same_run_gives_the_same_bytes(run: Path) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        (["evaluate/fidelity.json"], "The compressed model has not been measured"),
        (["exact.json"], "No prices were checked"),
        (["probes.json"], "No uniform plan was measured"),
        (["scores.safetensors"], "Units were not scored"),
        (["pareto.json"], "What other budgets would cost"),
        (["recipe.yaml"], "model.safetensors"),
        (["manifest.json"], "circuitpress 0.1.0"),
        (["exact.json", "probes.json", "scores.safetensors", "evaluate/fidelity.json"], "not measured yet"),
    ],
)
def test_missing_files_are_explained(copy: Path, missing: list[str], says: str) -> None:
    for name in missing:
        (copy / name).unlink()
    assert says in words(write_report(copy))


def test_a_check_of_nothing_is_no_check(copy: Path) -> None:
    (copy / "exact.json").write_text('{"rows": [], "spearman": null, "median_ratio": null}')
    assert "No prices were checked" in words(write_report(copy))


def test_text_stands_out_in_both_schemes() -> None:
    """A contrast of 4.5 at least (WCAG 2.2, 1.4.3): on the page, on cells of bits and on steps of the price ramp."""
    style = (resources.files("circuitpress.report") / "style.css").read_text()
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})\b", part))
        for part in style.partition("* { box-sizing")[0].split("@media screen and (prefers-color-scheme: dark)")
    )
    assert set(light) == set(dark) and len(light) > 30
    named = ("ink", "muted", "predicted", "corrected", "measured", "series0", "series1", "series2")
    pairs = [(name, ground) for name in named for ground in ("paper", "raised")]
    pairs += [(f"t{bits}", f"b{bits}") for bits in BITS]
    pairs += [("onlow" if step < BRIGHT else "onhigh", f"heat{step}") for step in range(HEATS)]
    for colours in (light, dark):
        for text, ground in pairs:
            one, other = sorted((luminance(colours[text]), luminance(colours[ground])))
            assert (other + 0.05) / (one + 0.05) >= 4.5, (text, ground, colours[text])


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb`."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize(
    ("missing", "hint"),
    [("plan.json", "plan"), ("prices.safetensors", "score"), ("anatomy.json", "score")],
)
def test_without_a_plan_there_is_no_report(copy: Path, missing: str, hint: str) -> None:
    (copy / missing).unlink()
    with pytest.raises(CircuitpressError, match=re.escape(missing)) as caught:
        write_report(copy)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(f"circuitpress {hint}")


def test_a_damaged_file_is_named(copy: Path) -> None:
    (copy / "exact.json").write_text('{"rows": [')
    with pytest.raises(CircuitpressError, match=r"exact\.json is damaged"):
        write_report(copy)


def test_names_cannot_break_the_page(copy: Path) -> None:
    (copy / "recipe.yaml").write_text('model: "<script>alert(1)</script>"\n')
    source = write_report(copy).read_text(encoding="utf-8")
    assert "<script" not in source
    assert "&lt;script&gt;" in source


def test_results_without_loss_are_shown(copy: Path) -> None:
    path = copy / "evaluate" / "fidelity.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kl": 0.0, "kl_stderr": 0.0, "top1_agreement": 1.0}))
    exact = {"rows": [{"group": "a", "format": "int8g64", "price": 0.0, "exact_kl": 0.0}], "spearman": None}
    (copy / "exact.json").write_text(json.dumps(exact))
    assert "1 interventions" not in (text := words(write_report(copy)))
    assert "1 intervention." in text
    assert "100.0%" in text


def test_a_tall_model_fits(tmp_path: Path) -> None:
    path = write_report(write_run(tmp_path / "tall", blocks=72, heads=40, neurons=100))
    assert path.stat().st_size < 700_000


def test_tasks_and_behaviors_are_shown_with_their_errors(copy: Path) -> None:
    row = {
        "task": "arc_easy", "metric": "acc", "reference": 0.5, "value": 0.46, "difference": -0.04,
        "difference_stderr": 0.011, "higher_is_better": True, "documents": 2376, "asked": True,
    }  # fmt: skip
    bare = row | {"task": "lambada", "metric": "perplexity", "difference_stderr": None, "higher_is_better": False}
    tasks = {
        "rows": [row, bare, row | {"task": "part", "asked": False}],
        "recovery": 0.92,
        "provenance": {"lm_eval": "1.2.3"},
    }
    (copy / "evaluate" / "tasks.json").write_text(json.dumps(tasks))
    behavior = {
        "name": "agreement", "pairs": 80, "reference_accuracy": 0.98, "accuracy": 0.91, "reference_margin": 3.2,
        "margin": 2.5, "kept": False,
    }  # fmt: skip
    (copy / "evaluate" / "behaviors.json").write_text(json.dumps([behavior]))
    assert "Rounding leans" not in write_report(copy).read_text()
    (copy / "behaviors.json").write_text(json.dumps({"leans": {"agreement": 2e-6}, "kl": [0.25, 0.26]}))
    page = write_report(copy).read_text()
    assert "KL on held-out text went from 0.250 to 0.260 for it" in page
    for text in ("arc_easy · acc", "-0.04 ± 0.011", "lambada · perplexity (less is better)", "92.0%", "1.2.3"):
        assert text in page
    for text in ("agreement", "98.0%", "91.0%", "LOST"):
        assert text in page
    assert "part · acc" not in page
    assert "Tasks: change of 1 scores" in page, "a figure for what has a paired error"


def test_an_audit_of_this_model_is_part_of_the_page(copy: Path) -> None:
    nbytes = json.loads((copy / "evaluate" / "fidelity.json").read_text())["bytes"]
    (copy / "audit.json").write_text(json.dumps(write_audited(nbytes)))
    path = write_report(copy)
    page, text = read(path), words(path)
    for expected in (
        "What changed inside", "Circuits that changed 1 of 2", "induction, reference", "0.97 (0.91 to 1.02)", "holds",
        "Features that survive 87.0%", "L2.head.1", "word-order", "Nothing is proved here.",
    ):  # fmt: skip
        assert expected in text, expected
    assert len(page.ids) == len(set(page.ids)) and set(page.references) <= set(page.ids)
    labels = [figure["aria-label"] for figure in page.figures]
    assert len(labels) == len(set(labels)) == 8
    assert "was not audited" not in text


@pytest.mark.parametrize("nbytes", [None, 17])
def test_an_audit_of_another_model_is_not(copy: Path, nbytes: int | None) -> None:
    if nbytes:
        (copy / "audit.json").write_text(json.dumps(write_audited(nbytes)))
    text = words(write_report(copy))
    assert "was not audited" in text and "circuitpress audit little/model --reference MODEL --out little" in text
    assert "Features that survive" not in text
