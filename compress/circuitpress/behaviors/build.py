"""Written prompts to tensors, with every reason why one of them cannot be used.

1. A prompt is tokenised as the tokenizer does by itself (with BOS where that is its way; a text that a chat template
   wrote carries its special tokens already, and gets none).
2. A contrast pair must align: clean and corrupted have equally many tokens and differ somewhere. The answers must be
   one token each *behind the prompt*: the prompt with the answer is tokenised as a whole, since a tokenizer may join
   what stands apart (`" 17"` + `"41"`), and must be the prompt's tokens and one more.
3. Sentences are scored from the first token in which they differ.
4. Equal prompts are duplicates: they would count one example twice.

Problems are returned with the index of their prompt and never raised here: the caller knows the file and its lines, and
shows all of them at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CircuitpressError
from .types import Pairs, Sentences

if TYPE_CHECKING:
    import transformers


class Unfit(CircuitpressError):
    """A behavior that a tokenizer cannot express: not a fault of the file that asks for it."""


@dataclass(frozen=True)
class Contrast:
    """A contrast pair as text; `answer` and `wrong` follow the prompt directly, so they bring their own space."""

    clean: str
    corrupted: str
    answer: str
    wrong: str


@dataclass(frozen=True)
class Minimal:
    """A minimal pair of sentences as text."""

    good: str
    bad: str


@dataclass(frozen=True)
class Problem:
    """Why prompt number `index` cannot be used."""

    index: int
    message: str


def encode(text: str, tokenizer: "transformers.PreTrainedTokenizerBase", *, special: bool = True) -> list[int]:
    """Ids of `text`; with `special` the BOS token comes first where the tokenizer puts it by itself.

    An EOS that some tokenizers append is left out: nothing could follow it.
    """
    plain = _ids(tokenizer(text, add_special_tokens=False, verbose=False))
    if not special:
        return plain
    full = _ids(tokenizer(text, verbose=False))
    bos = tokenizer.bos_token_id
    return [full[0], *plain] if full[:1] == [bos] and plain[:1] != [bos] else plain


def _ids(encoding: Mapping[str, Any]) -> list[int]:
    ids = encoding["input_ids"]
    assert isinstance(ids, list)
    return ids


def build_pairs(
    contrasts: Sequence[Contrast], tokenizer: "transformers.PreTrainedTokenizerBase", *, special: bool = True
) -> tuple[Pairs | None, list[Problem]]:
    """The usable contrast pairs in order (None if there are none), and a problem for every other one."""
    rows: list[tuple[list[int], list[int], int, int]] = []
    problems: list[Problem] = []
    seen: dict[tuple[tuple[int, ...], int, int], int] = {}
    for index, contrast in enumerate(contrasts):
        row, faults = _contrast(contrast, tokenizer, special)
        if row is not None:
            key = (tuple(row[0]), row[2], row[3])
            if key in seen:
                faults = [f"the same prompt and answers as pair {seen[key] + 1}"]
            else:
                seen[key] = index
                rows.append(row)
        problems += [Problem(index, fault) for fault in faults]
    if not rows:
        return None, problems
    clean, corrupted = pad([row[0] for row in rows]), pad([row[1] for row in rows])
    position = torch.tensor([len(row[0]) - 1 for row in rows])
    answer, wrong = (torch.tensor([row[side] for row in rows]) for side in (2, 3))
    return Pairs(clean, corrupted, position, answer, wrong), problems


def _contrast(
    contrast: Contrast, tokenizer: "transformers.PreTrainedTokenizerBase", special: bool
) -> tuple[tuple[list[int], list[int], int, int] | None, list[str]]:
    clean, corrupted = (encode(text, tokenizer, special=special) for text in (contrast.clean, contrast.corrupted))
    faults = []
    if len(clean) != len(corrupted):
        faults.append(
            f"clean has {len(clean)} tokens and corrupted {len(corrupted)}: they must align token by token "
            f"({_show(tokenizer, clean)} / {_show(tokenizer, corrupted)})"
        )
    elif not clean:
        faults.append("the prompt is empty")
    elif (unknown := tokenizer.unk_token_id) is not None and unknown in (*clean, *corrupted):
        faults.append(f"the tokenizer does not know all of it ({_show(tokenizer, clean)})")
    elif clean == corrupted:
        faults.append("clean and corrupted are the same prompt")
    answers = []
    for name in ("answer", "wrong"):
        text = getattr(contrast, name)
        token = next_token(contrast.clean, text, tokenizer, special=special)
        if token is None:
            faults.append(
                f"{name} {text!r} is not one token behind the prompt: {_why(contrast.clean, text, tokenizer)}"
            )
        answers.append(token)
    if None not in answers and answers[0] == answers[1]:
        faults.append(f"answer and wrong are the same token {contrast.answer!r}")
    return (None, faults) if faults else ((clean, corrupted, answers[0], answers[1]), [])


def next_token(
    prompt: str, answer: str, tokenizer: "transformers.PreTrainedTokenizerBase", *, special: bool = True
) -> int | None:
    """The id of `answer` behind `prompt` if it is exactly one token there, else None."""
    before = encode(prompt, tokenizer, special=special)
    both = encode(prompt + answer, tokenizer, special=special)
    alone = len(both) == len(before) + 1 and both[:-1] == before and both[-1] != tokenizer.unk_token_id
    return both[-1] if alone else None


def _why(prompt: str, answer: str, tokenizer: "transformers.PreTrainedTokenizerBase") -> str:
    before, both = (encode(text, tokenizer, special=False) for text in (prompt, prompt + answer))
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in both[len(before) :]:
        return "the tokenizer does not know it"
    if both[: len(before)] != before:
        return "the tokenizer joins it with the prompt's end; begin the answer with a space, or end the prompt earlier"
    return f"it is {_show(tokenizer, both[len(before) :])}"


def build_sentences(
    minimals: Sequence[Minimal], tokenizer: "transformers.PreTrainedTokenizerBase"
) -> tuple[Sentences | None, list[Problem]]:
    """The usable minimal pairs in order (None if there are none), and a problem for every other one."""
    rows: list[tuple[list[int], list[int], int]] = []
    problems: list[Problem] = []
    seen: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    for index, minimal in enumerate(minimals):
        good, bad = (encode(text, tokenizer) for text in (minimal.good, minimal.bad))
        # The first token has no prediction: without a BOS it is given, and not scored.
        shared = next((i for i, (a, b) in enumerate(zip(good, bad, strict=False)) if a != b), min(len(good), len(bad)))
        start = max(1, shared)
        if good == bad:
            problems.append(Problem(index, "good and bad are the same sentence"))
        elif start >= min(len(good), len(bad)):
            problems.append(Problem(index, "one sentence is the other's beginning, or has a single token"))
        elif (key := (tuple(good), tuple(bad))) in seen:
            problems.append(Problem(index, f"the same sentences as pair {seen[key] + 1}"))
        else:
            seen[key] = index
            rows.append((good, bad, start))
    if not rows:
        return None, problems
    goods, bads = [row[0] for row in rows], [row[1] for row in rows]
    width = max(map(len, goods + bads))
    lengths = [torch.tensor([len(ids) for ids in side]) for side in (goods, bads)]
    start = torch.tensor([row[2] for row in rows])
    return Sentences(pad(goods, width), pad(bads, width), lengths[0], lengths[1], start), problems


def build_texts(
    texts: Sequence[str], tokenizer: "transformers.PreTrainedTokenizerBase", *, seed: int
) -> tuple[Sentences | None, list[Problem]]:
    """Plain text under the metric `loss`: every text against its own tokens in a seeded order, after the first."""
    good = [encode(text, tokenizer) for text in texts]
    problems = [Problem(i, "a text needs at least 3 tokens") for i, ids in enumerate(good) if len(ids) < 3]
    seen: dict[tuple[int, ...], int] = {}
    for i, ids in enumerate(good):
        if (first := seen.setdefault(tuple(ids), i)) != i:
            problems.append(Problem(i, f"the same text as text {first + 1}"))
    bad_ones = {problem.index for problem in problems}
    kept = [ids for i, ids in enumerate(good) if i not in bad_ones]
    if not kept:
        return None, problems
    generator = torch.Generator().manual_seed(seed)
    orders = [1 + torch.randperm(len(ids) - 1, generator=generator) for ids in kept]
    mixed = [[ids[0], *(ids[j] for j in order.tolist())] for ids, order in zip(kept, orders, strict=True)]
    length = torch.tensor([len(ids) for ids in kept])
    return Sentences(pad(kept), pad(mixed), length, length.clone(), torch.ones_like(length)), problems


def pad(rows: Sequence[Sequence[int]], length: int | None = None) -> Tensor:
    """Rows of ids as int64 [n, length], padded on the right with 0."""
    length = length or max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], dtype=torch.int64)


def _show(tokenizer: "transformers.PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """The tokens of `ids`, shortened for a message."""
    text = "|".join(str(tokenizer.decode([token])) for token in ids)
    return text if len(text) <= 80 else f"{text[:38]}...{text[-38:]}"
