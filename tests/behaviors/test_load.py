"""Files of behaviors: what they may hold, and every problem of a file with its line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from circuitpress.behaviors import Pairs, Sentences, load_behaviors
from circuitpress.behaviors.build import encode, next_token
from circuitpress.errors import RecipeError

TEXT = "the a king girl doctor saw found gave it them . Paris Rome Berlin France Italy Germany of capital is and"


@pytest.fixture(scope="session")
def words() -> Any:
    """A tokenizer of whole words with a BOS, as Llama's has; its words carry no spaces."""
    return word_tokenizer(TEXT.split())


def word_tokenizer(vocabulary: list[str], **extra: Any) -> Any:
    """A tokenizer of these words; ids 0 and 1 are BOS and the unknown word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    ids = {word: n for n, word in enumerate(["<s>", "<unk>", *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", **extra)


GOOD = """
behaviors:
  - name: capitals
    pairs:
      - {clean: the capital of France is, corrupted: the capital of Italy is, answer: " Paris", wrong: " Rome"}
      - {clean: France and, corrupted: Italy and, answer: " Germany", wrong: " Italy"}
  - name: grammar
    sentences:
      - {good: the king saw it, bad: the king saw the}
      - {good: a girl found them ., bad: a a found them}
  - name: plain
    seed: 3
    texts:
      - the king gave it
      - a girl and a doctor
  - {name: more, file: rows.jsonl, metric: accuracy}
"""


def test_everything_a_file_may_hold(words: Any, tmp_path: Path) -> None:
    path = tmp_path / "b.yaml"
    path.write_text(GOOD)
    row = {"clean": "a king of", "corrupted": "a girl of", "answer": " France", "wrong": " Italy"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n\n")
    capitals, grammar, plain, more = load_behaviors(path, words)
    pairs = capitals.pairs
    assert isinstance(pairs, Pairs)
    ids = words.get_vocab()
    assert pairs.clean.tolist()[0] == [0, *(ids[w] for w in ["the", "capital", "of", "France", "is"])]
    assert pairs.corrupted.tolist()[1] == [0, ids["Italy"], ids["and"], 0, 0, 0]
    assert pairs.position.tolist() == [5, 2]
    assert pairs.answer.tolist() == [ids["Paris"], ids["Germany"]]
    assert pairs.wrong.tolist() == [ids["Rome"], ids["Italy"]]
    assert (capitals.metric, grammar.metric, plain.metric, more.metric) == (
        "logit_diff",
        "sentence",
        "loss",
        "accuracy",
    )
    sentences = grammar.pairs
    assert isinstance(sentences, Sentences)
    assert sentences.start.tolist() == [4, 2]  # the first token that differs, behind the BOS
    assert sentences.good_length.tolist() == [5, 6]
    assert sentences.bad_length.tolist() == [5, 5]
    texts = plain.pairs
    assert isinstance(texts, Sentences)
    assert torch.equal(texts.good.sort(1).values, texts.bad.sort(1).values)
    assert not torch.equal(texts.good, texts.bad)
    assert len(more) == 1
    assert more.provenance["source"] == "rows.jsonl"
    assert capitals.provenance == {"source": "b.yaml", "pairs": 2}


def test_a_jsonl_file_is_one_behavior_also_in_blimps_form(words: Any, tmp_path: Path) -> None:
    path = tmp_path / "agreement.jsonl"
    rows = [{"sentence_good": "the king saw it", "sentence_bad": "the saw king it", "UID": "x"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (behavior,) = load_behaviors(path, words)
    assert (behavior.name, behavior.metric, len(behavior)) == ("agreement", "sentence", 1)


BAD = """
- name: many
  pairs:
    - {clean: the capital of France is, corrupted: the capital is, answer: " Paris", wrong: " Rome"}
    - {clean: France and, corrupted: France and, answer: " Paris", wrong: " Rome"}
    - {clean: France and, corrupted: Italy and, answer: " Paris is", wrong: " Paris is"}
    - {clean: France and, corrupted: Italy and, answer: " Paris", wrong: " Paris"}
    - {clean: France and, corrupted: Italy and, answer: " Paris", wrong: " Oslo"}
    - {clean: France or, corrupted: Italy and, answer: " Paris", wrong: " Rome"}
    - {clean: of France, corrupted: of Italy, answer: " Paris", wrong: " Rome"}
    - {clean: of France, corrupted: of Germany, answer: " Paris", wrong: " Rome"}
    - {clean: of France, answer: " Paris"}
- name: twins
  sentences:
    - {good: the king, bad: the king}
    - {good: the king saw, bad: the king}
    - {good: the king saw it, bad: the king it saw}
    - {good: the king saw it, bad: the king it saw}
- name: short
  texts: [the, the king saw, the king saw]
- pairs: []
- {name: twins, texts: [a king saw it], metric: speed}
- {name: both, texts: [a king saw it], file: x.jsonl}
- {name: odd, texts: [a king saw it], length: 3}
- {name: nothing, pairs: []}
- {name: flat, pairs: 3}
- {name: loud, sentences: [{good: the king saw it, bad: the king it saw}], metric: loss}
- {name: unknown, generator: indcution}
- {name: option, generator: induction, lenght: 9}
- {name: number, generator: induction, length: nine}
- {name: seeds, texts: [a king saw it], seed: x}
"""


def test_every_problem_is_named_with_its_line(words: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(BAD)
    with pytest.raises(RecipeError) as caught:
        load_behaviors(path, words)
    problems = [problem.removeprefix(f"{path}:") for problem in caught.value.problems]
    expected = [
        "4: clean has 6 tokens and corrupted 4: they must align token by token",
        "5: clean and corrupted are the same prompt",
        "6: answer ' Paris is' is not one token behind the prompt: it is Paris|is",
        "6: wrong ' Paris is' is not one token behind the prompt",
        "7: answer and wrong are the same token ' Paris'",
        "8: wrong ' Oslo' is not one token behind the prompt: the tokenizer does not know it",
        "9: the tokenizer does not know all of it (<s>|France|<unk>)",
        "11: the same prompt and answers as pair",
        "12: a row needs the texts clean, corrupted, answer, wrong (missing: corrupted, wrong)",
        "15: good and bad are the same sentence",
        "16: one sentence is the other's beginning",
        "18: the same sentences as pair",
        "19: a text needs at least 3 tokens",
        "19: the same text as text 2",
        "21: a behavior needs a name",
        "22: the name 'twins' appears twice, first in line 13",
        "22: twins: metric 'speed' is not one of logit_diff",
        "23: both: needs exactly one of pairs, sentences, texts, file, generator (found texts, file)",
        "24: odd: unknown key 'length'",
        "25: nothing: has no pairs",
        "26: flat: pairs is not a list",
        "27: loud: metric loss is for texts",
        "28: unknown: no generator 'indcution'; did you mean induction?",
        "29: option: induction has no option 'lenght'; did you mean length?",
        "30: number: induction: length is 'nine', not a number",
        "31: seeds: seed is 'x', not a number",
    ]
    left = list(problems)
    for start in expected:
        found = next((problem for problem in left if problem.startswith(start)), None)
        assert found, f"{start!r} is not among {left}"
        left.remove(found)
    assert not left
    assert "circuitpress check MODEL --behaviors" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "text", "cause"),
    [
        ("a.yaml", "- {name: x\n", "a.yaml:2: "),
        ("a.yaml", "- {name: x, name: y}\n", "a.yaml:1: key 'name' appears twice"),
        ("a.yaml", "- {[a]: 1, name: x}", "unhashable"),
        ("a.yaml", "just text", "not a list of behaviors"),
        ("a.yaml", "[]", "no behavior in it"),
        ("a.jsonl", '{"good": "the king"\n[1]\n', "a.jsonl:1: not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: not an object"),
        ("none.yaml", None, "cannot read the behaviors"),
    ],
)
def test_files_that_are_no_behaviors(words: Any, tmp_path: Path, name: str, text: str | None, cause: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_behaviors(tmp_path / name, words)
    assert cause in caught.value.message


def test_tokens_behind_a_prompt(tiny_gpt2: Path, words: Any) -> None:
    """A byte-level tokenizer joins what it can: the answer counts only where it stays apart."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    assert encode("the boat", tokenizer) == tokenizer("the boat")["input_ids"]
    joined = [
        w
        for w in tokenizer.get_vocab()
        if w.isascii() and w.isalpha() and len(w) == 2 and len(tokenizer(w)["input_ids"]) == 1
    ]
    assert joined
    for word in joined:  # what is one token leaves no token behind its beginning
        assert next_token(word[0], word[1], tokenizer) is None
    assert next_token("a b", ".", tokenizer) == tokenizer.get_vocab()["."]
    assert encode("the king", words) == [0, words.get_vocab()["the"], words.get_vocab()["king"]]
    assert encode("the king", words, special=False) == encode("the king", words)[1:]
    assert encode("<s> the", words, special=False)[0] == 0
