"""Text to windows of token ids.

1. The file is read (local files only; without one, the text that comes in the wheel) and tokenised as a whole, so that
   a window boundary never changes how a word is split. `<|endoftext|>` between documents becomes the tokenizer's own
   end-of-text token.
2. The ids are cut into consecutive windows of `length` that do not overlap, and a seeded permutation chooses among
   them: a larger sample of one seed begins with the smaller one, and parts of a sample are disjoint by construction.
3. With BOS on, every window starts with it (Llama- and Gemma-like models put an attention sink there: without it the
   measured loss and the curvature are of another model). `auto` does what the tokenizer does by itself.
4. `chat` first turns the text into conversations through the tokenizer's chat template and packs them end to end.

What was done is recorded beside the ids (source, hashes, BOS), since KL values compare only on identical windows.
"""

import hashlib
import importlib.resources
import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .errors import CircuitpressError

if TYPE_CHECKING:
    import transformers

log = logging.getLogger(__name__)

SEPARATOR = "<|endoftext|>"
"""What separates documents in a text file."""

_LIMIT = 1 << 26  # 64 MiB: about 16 million tokens, far more than any calibration uses, tokenised in about a minute


@dataclass(frozen=True)
class Windows:
    """Token ids with their origin. `ids` is int64 [n, length]; `bos` the id that every window starts with, or None."""

    ids: Tensor
    source: str
    format: str
    text_sha256: str
    bos: int | None

    @property
    def ids_sha256(self) -> str:
        """Hex digest of the ids in row order."""
        return hashlib.sha256(self.ids.contiguous().numpy().tobytes()).hexdigest()

    def describe(self) -> dict[str, str | int | None]:
        """What to record beside every number measured on these windows."""
        n, length = self.ids.shape
        return {
            "source": self.source,
            "format": self.format,
            "windows": n,
            "length": length,
            "bos": self.bos,
            "text_sha256": self.text_sha256,
            "ids_sha256": self.ids_sha256,
        }


def load_windows(
    path: Path | None,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    *,
    length: int,
    samples: int,
    seed: int,
    format: Literal["text", "chat"] = "text",
    bos: Literal["auto", "never", "always"] = "auto",
    vocab: int | None = None,
) -> Windows:
    """At most `samples` windows [n, length] of the text at `path`; fewer if the text is short. `length` includes BOS.

    `vocab` is the model's vocabulary size; ids beyond it mean that the tokenizer belongs to another model. Raises
    CircuitpressError for a missing, empty or too short text, a missing chat template and a missing BOS token.
    """
    text, source, chat_rows = _read(path)
    first = _bos_id(tokenizer, bos)
    if format == "chat":
        pieces = list(_render(tokenizer, chat_rows, text, source))
        opening = tokenizer.bos_token if isinstance(tokenizer.bos_token, str) else None
        if bos == "auto" and opening and pieces and pieces[0].startswith(opening):
            first = _bos_id(tokenizer, "always")
        if first is not None and opening:  # each window gets one; a second would be out of place
            pieces = [piece.removeprefix(opening) for piece in pieces]
        text_to_cut = "".join(pieces)
    else:
        text_to_cut = _own_separator(text, tokenizer)
    ids = torch.tensor(_encode(text_to_cut, tokenizer), dtype=torch.int64)
    own = length - (first is not None)
    if own < 1:
        raise CircuitpressError(
            f"windows of {length} tokens have no room beside the BOS token", hint="raise data.length"
        )
    if len(ids) < own:
        raise CircuitpressError(
            f"{source} has {len(ids)} tokens, one window needs {own}",
            hint=f"give a longer text, or --set data.length={max(2, len(ids) // 8)} for several shorter windows",
        )
    if vocab is not None and int(ids.max()) >= vocab:
        raise CircuitpressError(
            f"the tokenizer yields id {int(ids.max())}, the model knows ids below {vocab}",
            hint="the checkpoint has the tokenizer files of another model: copy the right ones into its folder",
        )
    rows = ids[: len(ids) // own * own].view(-1, own)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    chosen = rows[order[:samples]]
    if first is not None:
        chosen = torch.cat([torch.full((len(chosen), 1), first), chosen], dim=1)
    if len(chosen) < samples:
        log.info("%s: %d windows of %d tokens, %d were asked for", source, len(chosen), length, samples)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Windows(chosen.contiguous(), source, format, digest, first)


def split(windows: Windows, *counts: int) -> tuple[Windows, ...]:
    """Cuts windows into disjoint parts of `counts` windows, in proportion if there are fewer, each with at least one.

    Raises CircuitpressError if there are fewer windows than parts.
    """
    n, wanted = len(windows.ids), sum(counts)
    if n < len(counts):
        raise CircuitpressError(
            f"{windows.source} has {n} windows of {windows.ids.shape[1]} tokens; calibrating, probing and testing on "
            f"disjoint text need at least {len(counts)}",
            hint="give a longer text, a second one as data.test, or a smaller data.length",
        )
    sizes = list(counts) if n >= wanted else [max(1, n * count // wanted) for count in counts]
    sizes[sizes.index(max(sizes))] += min(n, wanted) - sum(sizes)
    stops = list(itertools.accumulate(sizes))
    return tuple(replace(windows, ids=windows.ids[b - size : b]) for size, b in zip(sizes, stops, strict=True))


def text_digest(path: Path | None) -> str:
    """Hex digest of the text that `load_windows` would read, without a tokenizer."""
    return hashlib.sha256(_read(path)[0].encode()).hexdigest()


def _read(path: Path | None) -> tuple[str, str, bool]:
    """The text, its name for messages, and whether it is a file of JSON rows."""
    if path is None:
        file = importlib.resources.files("circuitpress") / "text" / "default.txt"
        return file.read_text(encoding="utf-8"), "circuitpress's default text", False
    try:
        with path.open("rb") as stream:
            raw = stream.read(_LIMIT + 1)
    except OSError as error:
        raise CircuitpressError(
            f"cannot read the text {path}: {error.strerror}", hint="check data.calibration, data.test or --text"
        ) from error
    if len(raw) > _LIMIT:
        log.warning("%s is larger than %d MiB: only its beginning is used", path, _LIMIT >> 20)
        raw = raw[:_LIMIT].rsplit(b"\n", 1)[0]
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CircuitpressError(
            f"{path} is not UTF-8 text (byte {error.start})", hint=f"convert it: iconv -t utf-8 {path}"
        ) from error
    if not text.strip():
        raise CircuitpressError(f"{path} is empty", hint="give a text with at least one window of tokens")
    return text, str(path), path.suffix == ".jsonl"


def _bos_id(tokenizer: "transformers.PreTrainedTokenizerBase", bos: str) -> int | None:
    token = tokenizer.bos_token_id
    if bos == "never" or (bos == "auto" and not isinstance(token, int)):
        return None
    if not isinstance(token, int):
        raise CircuitpressError("data.bos is always, but the tokenizer has no BOS token", hint="--set data.bos=auto")
    if bos == "always":
        return token
    plain, by_default = _encode("a", tokenizer), tokenizer("a")["input_ids"]
    assert isinstance(by_default, list)
    return token if by_default[: 1 + len(plain)] == [token, *plain] else None


def _encode(text: str, tokenizer: "transformers.PreTrainedTokenizerBase") -> list[int]:
    """Ids of a text without added special tokens; `verbose=False`: longer than the context is what is wanted here."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert isinstance(ids, list)
    return ids


def _own_separator(text: str, tokenizer: "transformers.PreTrainedTokenizerBase") -> str:
    """`<|endoftext|>` as this tokenizer's end-of-text token, or as a blank line if it has none."""
    if SEPARATOR not in text or SEPARATOR in tokenizer.get_vocab():
        return text
    return text.replace(SEPARATOR, str(tokenizer.eos_token or "\n\n"))


def _render(tokenizer: "transformers.PreTrainedTokenizerBase", rows: bool, text: str, source: str) -> Iterator[str]:
    """Conversations in the tokenizer's chat template."""
    if not tokenizer.chat_template:
        raise CircuitpressError(
            "data.format is chat, but the tokenizer has no chat template",
            hint="--set data.format=text, or take the checkpoint's instruct version",
        )
    for messages in _rows(text, source) if rows else _turns(text):
        yield str(tokenizer.apply_chat_template(messages, tokenize=False))


def _rows(text: str, source: str) -> Iterator[list[dict[str, str]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            messages = json.loads(line)["messages"]
            valid = all(isinstance(turn["role"], str) and isinstance(turn["content"], str) for turn in messages)
        except (ValueError, KeyError, TypeError):
            messages, valid = None, False
        if not valid or not messages:
            raise CircuitpressError(
                f"{source}, line {number}: not a conversation",
                hint='every line is one: {"messages": [{"role": "user", "content": "..."}, ...]}',
            )
        yield messages


def _turns(text: str) -> Iterator[list[dict[str, str]]]:
    """Plain text as conversations of one turn each: a line is the user's, the next line the assistant's."""
    for document in text.split(SEPARATOR):
        lines = [line.strip() for line in document.splitlines() if line.strip()]
        for question, answer in zip(lines[::2], lines[1::2], strict=False):
            yield [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if len(lines) % 2:
            yield [{"role": "user", "content": "Continue."}, {"role": "assistant", "content": lines[-1]}]
