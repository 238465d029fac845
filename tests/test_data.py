"""Windows: cut from the whole text, disjoint, seeded, BOS pinned, chat packed; every bad text is a clear error."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from circuitpress.data import SEPARATOR, Windows, load_windows, split, text_digest
from circuitpress.errors import CircuitpressError

CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def with_bos(tokenizer: Any) -> Any:
    """The same tokenizer, adding `<s>` (id 97) in front by default, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<s>"})
    token = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", token)])
    return tokenizer


def load(path: Path | None, tokenizer: Any, **options: Any) -> Windows:
    return load_windows(path, tokenizer, **({"length": 13, "samples": 1000, "seed": 3} | options))


def test_windows_are_a_permutation_of_the_whole_texts_ids(text: str, text_file: Path, tokenizer: Any) -> None:
    windows = load(text_file, tokenizer)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = [tuple(whole[i : i + 13]) for i in range(0, len(whole) - 12, 13)]
    got = [tuple(row) for row in windows.ids[:1000].tolist()]
    assert len(rows) > 1000  # the text is long enough for the sample to be a choice
    assert len(got) == 1000
    assert set(got) <= set(rows)
    everything = load(text_file, tokenizer, samples=10**6)
    assert sorted(tuple(row) for row in everything.ids.tolist()) == sorted(rows)
    assert everything.ids.dtype == torch.int64


def test_a_larger_sample_begins_with_the_smaller_and_the_seed_decides(text_file: Path, tokenizer: Any) -> None:
    few, many = load(text_file, tokenizer, samples=5), load(text_file, tokenizer, samples=9)
    assert torch.equal(few.ids, many.ids[:5])
    other = load(text_file, tokenizer, samples=5, seed=4)
    assert not torch.equal(few.ids, other.ids)
    assert few.text_sha256 == other.text_sha256 == text_digest(text_file)
    assert few.ids_sha256 != other.ids_sha256
    assert few.describe()["windows"] == 5


def test_parts_are_disjoint_and_as_large_as_asked(text_file: Path, tokenizer: Any) -> None:
    windows = load(text_file, tokenizer, samples=24)
    parts = split(windows, 16, 5, 3)
    assert [len(part.ids) for part in parts] == [16, 5, 3]
    assert torch.equal(torch.cat([part.ids for part in parts]), windows.ids)


@pytest.mark.parametrize(("n", "sizes"), [(10, [6, 2, 2]), (3, [1, 1, 1]), (4, [2, 1, 1]), (100, [50, 25, 25])])
def test_a_short_text_is_shared_in_proportion(n: int, sizes: list[int]) -> None:
    windows = Windows(torch.arange(n * 4).view(n, 4), "text", "text", "", None)
    parts = split(windows, 128, 64, 64)
    assert [len(part.ids) for part in parts] == sizes
    assert torch.equal(torch.cat([part.ids for part in parts]), windows.ids)


def test_fewer_windows_than_parts_is_an_error() -> None:
    with pytest.raises(CircuitpressError, match="has 2 windows of 4 tokens.* need at least 3"):
        split(Windows(torch.zeros(2, 4, dtype=torch.int64), "text", "text", "", None), 8, 4, 4)


def test_the_separator_is_one_token_and_becomes_the_tokenizers_own(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "t.txt"
    path.write_text(f"the boat{SEPARATOR}the sea" * 20)
    ids = load(path, tokenizer, length=3).ids.flatten().tolist()
    assert ids.count(tokenizer.eos_token_id) >= 19


def test_a_tokenizer_with_another_end_mark_gets_its_own(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"</s>": 0, "boat": 1, "sea": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "t.txt"
    path.write_text(f"boat{SEPARATOR}sea")
    windows = load(path, PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>"), length=3)
    assert windows.ids.tolist() == [[1, 0, 2]]


@pytest.mark.parametrize(("bos", "expected"), [("auto", 97), ("always", 97), ("never", None)])
def test_bos_starts_every_window_if_the_tokenizer_adds_one(
    text_file: Path, with_bos: Any, bos: str, expected: int | None
) -> None:
    windows = load(text_file, with_bos, samples=7, bos=bos)
    assert windows.bos == expected == windows.describe()["bos"]
    assert windows.ids.shape == (7, 13)
    if expected is not None:
        assert (windows.ids[:, 0] == expected).all()
        assert (windows.ids[:, 1:] != expected).all()


def test_without_a_bos_token_auto_means_none_and_always_is_an_error(text_file: Path, tokenizer: Any) -> None:
    assert load(text_file, tokenizer).bos is None
    with pytest.raises(CircuitpressError, match="has no BOS token"):
        load(text_file, tokenizer, bos="always")


def test_chat_rows_go_through_the_template_end_to_end(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT
    path = tmp_path / "t.jsonl"
    rows = [
        [{"role": "user", "content": f"the boat {i}"}, {"role": "assistant", "content": "a river"}] for i in range(9)
    ]
    path.write_text("\n\n".join(json.dumps({"messages": row}) for row in rows))
    windows = load(path, tokenizer, format="chat", length=5)
    packed = "".join(tokenizer.apply_chat_template(row, tokenize=False) for row in rows)
    whole = tokenizer(packed, add_special_tokens=False)["input_ids"]
    expected = sorted(tuple(whole[i : i + 5]) for i in range(0, len(whole) - 4, 5))
    assert sorted(tuple(row) for row in windows.ids.tolist()) == expected
    assert windows.format == "chat"


def test_chat_from_plain_text_alternates_the_lines() -> None:
    from circuitpress import data

    turns = list(data._turns(f"one\n\ntwo\nthree\n{SEPARATOR}\nfour\nfive\n"))
    said = [[turn["content"] for turn in turn_pair] for turn_pair in turns]
    assert said == [["one", "two"], ["Continue.", "three"], ["four", "five"]]
    assert all([turn["role"] for turn in pair] == ["user", "assistant"] for pair in turns)


def test_a_templates_own_bos_is_moved_to_the_front_of_every_window(text_file: Path, with_bos: Any) -> None:
    with_bos.chat_template = "{{ bos_token }}" + CHAT
    windows = load(text_file, with_bos, format="chat", samples=11)
    assert windows.bos == 97
    assert (windows.ids[:, 0] == 97).all()
    assert (windows.ids[:, 1:] != 97).all()


@pytest.mark.parametrize(
    "row", ['{"text": "no"}', "not json", '{"messages": []}', '{"messages": [{"role": "user"}]}', "3"]
)
def test_a_row_that_is_no_conversation_names_its_line(tmp_path: Path, tokenizer: Any, row: str) -> None:
    tokenizer.chat_template = CHAT
    path = tmp_path / "t.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "the"}]}\n' + row)
    with pytest.raises(CircuitpressError, match=r"t\.jsonl, line 2: not a conversation"):
        load(path, tokenizer, format="chat", length=2)


def test_chat_without_a_template_is_an_error(text_file: Path, tokenizer: Any) -> None:
    with pytest.raises(CircuitpressError, match="no chat template") as caught:
        load(text_file, tokenizer, format="chat")
    assert "data.format=text" in str(caught.value.hint)


def test_bad_texts(tmp_path: Path, text_file: Path, tokenizer: Any) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("the boat")
    (tmp_path / "latin.txt").write_bytes(b"na\xefve " * 50)
    count = len(tokenizer("the boat")["input_ids"])
    for path, options, message in (
        (tmp_path / "nothing.txt", {}, "cannot read the text .*nothing.txt: No such file"),
        (tmp_path, {}, "cannot read the text .*: Is a directory"),
        (tmp_path / "empty.txt", {}, "empty.txt is empty"),
        (tmp_path / "short.txt", {"length": 50}, f"short.txt has {count} tokens, one window needs 50"),
        (tmp_path / "latin.txt", {}, r"latin.txt is not UTF-8 text \(byte 2\)"),
        (text_file, {"vocab": 50}, r"the tokenizer yields id \d+, the model knows ids below 50"),
    ):
        with pytest.raises(CircuitpressError, match=message) as caught:
            load(path, tokenizer, **options)
        assert caught.value.hint


def test_only_the_beginning_of_a_huge_text_is_read(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("circuitpress.data._LIMIT", 100)
    path = tmp_path / "huge.txt"
    path.write_text("the boat\n" * 50)
    whole = tokenizer("\n".join(["the boat"] * 11), add_special_tokens=False)["input_ids"]
    assert load(path, tokenizer, length=2).ids.numel() == len(whole) // 2 * 2
    assert "only its beginning is used" in caplog.text


def test_the_default_text_comes_with_the_package(tokenizer: Any) -> None:
    windows = load(None, tokenizer, samples=3, length=64)
    assert windows.source == "circuitpress's default text"
    assert windows.ids.shape == (3, 64)
    assert windows.text_sha256 == text_digest(None)
