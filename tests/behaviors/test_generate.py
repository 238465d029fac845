"""Generators: what they make means what it should, for tokenizers of several kinds, or they say why they cannot."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from circuitpress.behaviors import GENERATORS, Behavior, Pairs, Sentences, Unfit, generate, load_behaviors
from circuitpress.behaviors.build import encode
from circuitpress.behaviors.sources import OWN
from circuitpress.errors import CircuitpressError

from .test_load import word_tokenizer

RECIPES = Path(__file__).parents[2] / "recipes"
BUILTIN = RECIPES / "behaviors" / "builtin.yaml"


@pytest.fixture(scope="module")
def demo() -> Any:
    """The demo checkpoint's tokenizer: byte-level BPE, 4096 ids, no BOS; single digits."""
    return AutoTokenizer.from_pretrained(RECIPES / "demo" / "checkpoint")


def pairs_of(behavior: Behavior) -> Pairs:
    """Its contrast pairs."""
    assert isinstance(behavior.pairs, Pairs)
    return behavior.pairs


def prompt(tokenizer: Any, pairs: Pairs, n: int, side: str = "clean") -> str:
    """Prompt n as text."""
    return tokenizer.decode(getattr(pairs, side)[n, : pairs.position[n] + 1])


@pytest.mark.parametrize("length", [8, 16])
def test_induction_can_be_answered_from_the_prompt_alone(demo: Any, length: int) -> None:
    pairs = pairs_of(generate("induction", "i", demo, {"samples": 20, "seed": 4, "length": length}))
    assert pairs.clean.shape[0] == 20
    for n in range(20):
        end = int(pairs.position[n]) + 1
        for side, answer in (("clean", pairs.answer), ("corrupted", pairs.wrong)):
            ids = getattr(pairs, side)[n, :end].tolist()
            first, again = ids[:length], ids[length:]
            assert len(set(first)) == length
            assert set(again) <= set(first)
            assert first[first.index(again[-1]) + 1] == answer[n]
        # What asks, and what is answered, stand at the same places; what comes before the answers has moved.
        assert int((pairs.clean[n] != pairs.corrupted[n]).sum()) == 2
        clean, corrupted = (getattr(pairs, side)[n, :length].tolist() for side in ("clean", "corrupted"))
        assert clean.index(int(pairs.answer[n])) == corrupted.index(int(pairs.answer[n]))


def test_ioi_repeats_one_name_and_asks_for_the_other(demo: Any) -> None:
    behavior = generate("ioi", "i", demo, {"samples": 30})
    pairs = pairs_of(behavior)
    assert len(pairs) == 30
    for n in range(30):
        answer, wrong = (demo.decode([int(field[n])]) for field in (pairs.answer, pairs.wrong))
        clean, corrupted = (prompt(demo, pairs, n, side) for side in ("clean", "corrupted"))
        assert (clean.count(answer), clean.count(wrong)) == (1, 2)
        assert (corrupted.count(answer), corrupted.count(wrong)) == (2, 1)
        assert clean.endswith(" to")
        assert int((pairs.clean[n] != pairs.corrupted[n]).sum()) == 1
    assert behavior.provenance["generator"] == "ioi"


def test_greater_than_with_single_digits_and_with_two(demo: Any) -> None:
    several = word_tokenizer(
        ["The", "war", "siege", "journey", "reign", "trial", "plague", "quarrel", "winter", "lasted", "from", "the",
         "year", "to", *map(str, range(11, 19)), *(f"{n:02}" for n in range(100))],
    )  # fmt: skip
    from tokenizers import Regex, pre_tokenizers

    pieces = pre_tokenizers.Split(Regex(r"\d\d|[A-Za-z]+|\s"), "isolated")
    blanks = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    several.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([blanks, pieces])
    for tokenizer, digits in ((demo, 1), (several, 2)):
        pairs = pairs_of(generate("greater_than", "g", tokenizer, {"samples": 12, "seed": 1}))
        for n in range(12):
            text = prompt(tokenizer, pairs, n).replace(" ", "")
            start = int(text[text.index("year") + 6 :][:digits])
            answer, wrong = (int(tokenizer.decode([int(field[n])])) for field in (pairs.answer, pairs.wrong))
            assert wrong < start < answer
            other = prompt(tokenizer, pairs, n, "corrupted").replace(" ", "")
            assert other[other.index("year") + 6 :][:2] == "01"


def test_brackets_close_what_was_opened(demo: Any) -> None:
    pairs, kinds = pairs_of(generate("brackets", "b", demo, {"samples": 16})), dict(zip("([{<", ")]}>", strict=True))
    for n in range(16):
        for side, answer in (("clean", pairs.answer), ("corrupted", pairs.wrong)):
            text = prompt(demo, pairs, n, side)
            opened = [kinds[c] for c in text if c in kinds]
            assert opened == [demo.decode([int(answer[n])])]


def test_generators_are_seeded_and_prompts_differ(demo: Any) -> None:
    for name in ("induction", "ioi", "greater_than", "brackets"):
        one, again, other = (pairs_of(generate(name, "x", demo, {"samples": 16, "seed": s})) for s in (0, 0, 1))
        assert torch.equal(one.clean, again.clean)
        assert one.clean.shape != other.clean.shape or not torch.equal(one.clean, other.clean)
        rows = [
            (*row, a, w) for row, a, w in zip(one.clean.tolist(), one.answer.tolist(), one.wrong.tolist(), strict=True)
        ]
        assert len(set(rows)) == 16


def test_blimp_and_facts_from_files(tmp_path: Path) -> None:
    lands, cities = [f"Land{i}" for i in range(6)], [f"City{i}" for i in range(6)]
    tokenizer = word_tokenizer([*["The", "capital", "of", "is", "New", "a", "b", "c", "d"], *lands, *cities])
    rows = [{"subject": land, "answer": city} for land, city in zip(lands, cities, strict=True)]
    rows[5]["subject"] = "New Land5"  # two tokens: pairs with nobody
    rows.append({"subject": "Land5", "answer": "Elsewhere"})  # unknown answer
    with (tmp_path / "facts.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["subject", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    pairs = pairs_of(generate("facts", "f", tokenizer, {"file": "facts.csv", "samples": 12}, folder=tmp_path))
    assert len(pairs) == 12
    for n in range(12):
        land = prompt(tokenizer, pairs, n).split()[-2]
        assert tokenizer.decode([int(pairs.answer[n])]) == land.replace("Land", "City")
        assert prompt(tokenizer, pairs, n, "corrupted").split()[-2].replace("Land", "City") == tokenizer.decode(
            [int(pairs.wrong[n])]
        )
    sentences = [{"sentence_good": f"a b {x} {y}", "sentence_bad": f"a {x} b {y}"} for x in "cd" for y in lands]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sentences))
    blimp = generate("blimp", "b", tokenizer, {"file": "b.jsonl", "samples": 9}, folder=tmp_path)
    assert isinstance(blimp.pairs, Sentences)
    assert (len(blimp), blimp.metric) == (9, "sentence")
    for options, cause in (
        ({"file": "none.jsonl"}, "cannot read"),
        ({"file": "facts.csv", "template": "no subject"}, "does not say where {subject} goes"),
    ):
        with pytest.raises(CircuitpressError, match=cause):
            generate("facts", "f", tokenizer, options, folder=tmp_path)


TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} / {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def test_chat_behaviors_go_through_the_template(tmp_path: Path) -> None:
    words = [w for i in range(9) for w in (f"bad{i}", f"good{i}")]
    tokenizer = word_tokenizer(
        [*["user", "assistant", "system", ":", "/", "Do", "Yes", "I", "Sure", "be", "nice"], *words]
    )
    tokenizer.chat_template = TEMPLATE
    pairs = [{"clean": f"Do bad{i}", "corrupted": f"Do good{i}"} for i in range(9)]
    pairs.append({"clean": "Do bad1 bad1", "corrupted": "Do good1"})  # does not align: left out
    pairs[1] |= {"answer": " Yes", "begin": " I"}
    document = {"answer": " I", "wrong": " Sure", "pairs": pairs}
    (tmp_path / "c.yaml").write_text(json.dumps(document))
    behavior = generate("chat", "refusal", tokenizer, {"file": "c.yaml", "system": "be nice"}, folder=tmp_path)
    found = pairs_of(behavior)
    assert behavior.provenance["unfit"] == 1
    assert prompt(tokenizer, found, 0) == "system : be nice / user : Do bad0 / assistant :"
    assert prompt(tokenizer, found, 1).endswith("assistant : I")
    assert tokenizer.decode([int(found.answer[1])]) == "Yes"
    assert prompt(tokenizer, found, 0, "corrupted").count("good0") == 1
    with pytest.raises(CircuitpressError, match="without the text answer, wrong"):
        (tmp_path / "c.yaml").write_text(json.dumps({"pairs": pairs[:1]}))
        generate("chat", "r", tokenizer, {"file": "c.yaml"}, folder=tmp_path)


def test_what_a_tokenizer_cannot_express_is_said(demo: Any) -> None:
    poor = word_tokenizer(["a", "b", "When", "(", ")"])
    for name, cause in (
        ("induction", "the tokenizer has 5 ordinary tokens, 64 are needed"),
        ("ioi", "four of our 64 names must be single tokens of this tokenizer; found: none"),
        ("greater_than", "splits a year neither"),
        ("brackets", "two closing brackets must be single tokens"),
        ("chat", "has no chat template"),
    ):
        with pytest.raises(Unfit, match=cause):
            generate(name, "x", poor, {"file": "x"} if name == "chat" else {})
    for options, cause in (
        ({"samples": 3}, "8 are needed"),
        ({"length": 4}, "at least 8 tokens"),
        ({"seed": "x"}, "not a number"),
    ):
        with pytest.raises(CircuitpressError, match=cause):
            generate("induction", "x", demo, options)
    with pytest.raises(CircuitpressError, match="facts needs the option file"):
        generate("facts", "x", demo)
    with pytest.raises(CircuitpressError, match="no generator 'indirect'"):
        generate("indirect", "x", demo)


def test_the_builtin_file_fits_the_demo_and_says_what_does_not(demo: Any) -> None:
    unfit: dict[str, str] = {}
    behaviors = {b.name: b for b in load_behaviors(BUILTIN, demo, unfit=unfit)}
    assert {"induction", "ioi", "greater-than", "brackets", "agreement", "word-order"} <= set(behaviors)
    assert {"refusal", "sycophancy", "honesty"} <= set(unfit)
    assert all("chat template" in unfit[name] for name in ("refusal", "sycophancy", "honesty"))
    assert all(len(behavior) == 64 for behavior in behaviors.values())
    with pytest.raises(CircuitpressError, match="refusal: chat: the tokenizer has no chat template"):
        load_behaviors(BUILTIN, demo)
    assert set(GENERATORS) == {"induction", "ioi", "greater_than", "brackets", "blimp", "facts", "chat"}


@pytest.mark.parametrize("name", ["refusal", "sycophancy", "honesty"])
def test_the_prompts_for_chat_models_align_in_words(name: str, demo: Any) -> None:
    """The demo's tokenizer with a template: most pairs survive its splitting of rare words."""
    import copy

    tokenizer = copy.deepcopy(demo)
    tokenizer.chat_template = TEMPLATE
    import yaml

    pairs = yaml.safe_load((OWN / f"{name}.yaml").read_text())["pairs"]
    assert all(len(pair["clean"].split()) == len(pair["corrupted"].split()) for pair in pairs)
    assert all(pair["clean"] != pair["corrupted"] for pair in pairs)
    lengths = [[len(encode(pair[side], tokenizer)) for side in ("clean", "corrupted")] for pair in pairs]
    assert sum(a == b for a, b in lengths) >= len(pairs) // 3
