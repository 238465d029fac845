"""The page of an audit: every section that its document has, and none that it has not; readable without script."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from circuitpress.report import write_audit

FIDELITY = {"kl": 0.0312, "top1_agreement": 0.914, "perplexity": 9.5, "reference_perplexity": 8.25, "tokens": 2048}
BEHAVIOR = {
    "name": "<agreement>", "metric": "sentence", "pairs": 40, "able": True, "lost": True, "reference_accuracy": 0.95,
    "accuracy": 0.6, "stderr": 0.08, "reference_mean": 3.25, "mean": 0.5,
}  # fmt: skip


def document(**more: Any) -> dict[str, Any]:
    base = {"model": "runs/a/model", "reference": "user/base", "fidelity": FIDELITY, "behaviors": []}
    return base | {"cannot_prove": "Nothing is proved here."} | more


def inside() -> dict[str, Any]:
    layers = [
        {"blocks": b, "difference": 0.1 * b, "cosine": 1 - 0.01 * b, "lens_kl": 0.02 * b, "lens_agreement": 0.9}
        for b in range(4)
    ]
    heads = [{"layer": i, "head": h, "distance": 0.05 * (i + h)} for i in range(3) for h in range(5)]
    patterns = [{"layer": 2, "head": 1, "pattern": "induction", "before": 0.8, "after": 0.1, "lost": True}]
    return {"layers": layers, "heads": heads, "patterns": patterns}


class Reader(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text())
    return reader


def test_everything_that_was_found_is_shown(tmp_path: Path) -> None:
    features = {
        "site": "L1.resid_post", "features": 512, "told": 300, "survivors": 0.87,
        "worst": [{"feature": 17, "correlation": 0.31, "reference_rate": 0.02, "rate": 0.001}],
    }  # fmt: skip
    page = read(
        write_audit(document(behaviors=[BEHAVIOR], features=features, **inside()), tmp_path / "a" / "audit.html")
    )
    text = " ".join(" ".join(page.text).split())
    for expected in (
        "a/model against base", "0.0312", "91.4%", "Lost: <agreement>", "-35.0% ± 8.0%", "L2.head.1",
        "induction", "0.80", "87.0%", "300 of 512", "17", "0.31", "Nothing is proved here.",
    ):  # fmt: skip
        assert expected in text, expected
    labels = [attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg"]
    assert len(labels) == 2
    assert all(labels)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe"}


def test_circuits_and_the_limits_of_the_safety_set(tmp_path: Path) -> None:
    side = {"faithfulness": {"value": 0.97, "low": 0.91, "high": 1.02}, "left": 0.04, "whole": 6.5, "empty": -1.0}
    row = {"behavior": "induction", "size": 3, "granularity": "nodes", "reference": side}
    rows = [row | {"model": side, "lost": False}, row | {"model": {"reason": "no effect here"}, "lost": True}]
    page = read(write_audit(document(behaviors=[BEHAVIOR | {"safety": True}], circuits=rows), tmp_path / "audit.html"))
    text = " ".join(" ".join(page.text).split())
    for expected in (
        "0.97 (0.91 to 1.02)",
        "3 nodes",
        "holds",
        "LOST",
        "no effect here",
        "Circuits that changed 1 of 2",
    ):
        assert expected in text, expected
    assert "not that a model is safe" in text
    plain = read(write_audit(document(behaviors=[BEHAVIOR]), tmp_path / "plain.html"))
    assert "not that a model is safe" not in " ".join(plain.text)


@pytest.mark.parametrize("alike", [True, False])
def test_what_was_not_looked_at_is_not_on_the_page(alike: bool, tmp_path: Path) -> None:
    found = inside() if alike else {}
    page = read(write_audit(document(**found), tmp_path / "audit.html"))
    sections = {attributes.get("id") for tag, attributes in page.tags if tag == "section"}
    assert sections == ({"layers", "attention", "patterns"} if alike else set())


def test_the_same_document_gives_the_same_bytes(tmp_path: Path) -> None:
    value = document(**inside())
    first = write_audit(value, tmp_path / "1.html").read_bytes()
    assert write_audit(json.loads(json.dumps(value)), tmp_path / "2.html").read_bytes() == first
