"""Tasks whose prompts are made up: induction, indirect objects, greater-than, closing brackets.

Each function proposes candidates in a seeded order and leaves it to `build_pairs` to say which align.

- `induction` (Olsson et al., arXiv 2209.11895): random tokens `.. A B .. C D .. | .. A`, answer B, wrong D. Corrupted,
  A and C have changed places in the first part, so that the answer is D. (With B and D exchanged it would be D as well,
  but what stands before B would be the same in both prompts, and patching blind to the heads that pass it on.)
- `ioi` (Wang et al., arXiv 2211.00593): two names, one of which comes again; the answer is the other. Corrupted, the
  other one comes again.
- `greater_than` (Hanna et al., arXiv 2305.00586): a war that began in 1741 ended in a later year of that century.
  Corrupted, it began in 1701, after which both answers are later: the metric goes to about zero instead of flipping.
- `brackets`: an opened bracket is closed by its own kind. Corrupted, it was opened by the other kind.
"""

import random
from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import TYPE_CHECKING

import torch

from ..errors import CircuitpressError
from .build import Contrast, Unfit, encode, next_token, pad
from .types import Behavior, Pairs

if TYPE_CHECKING:
    import transformers


_NAMES = (
    "Mary", "John", "Tom", "James", "Anna", "Lily", "Tim", "Ben", "Sam", "Max", "Mia", "Sue", "Jack", "Lucy", "Anne",
    "Emma", "Peter", "Paul", "Kate", "Jane", "Sarah", "David", "George", "Henry", "William", "Charles", "Robert",
    "Thomas", "Edward", "Alice", "Arthur", "Mark", "Luke", "Daniel", "Michael", "Laura", "Helen", "Rose", "Ruth",
    "Martin", "Simon", "Frank", "Harry", "Joseph", "Elizabeth", "Margaret", "Richard", "Walter", "Philip", "Francis",
    "Alexander", "Jim", "Dick", "Fred", "Amy", "Joe", "Sara", "Bob", "Dan", "Sally", "Jenny", "Billy", "Jill", "Nick",
)  # fmt: skip
_PLACES = ("garden", "house", "river", "shop", "school", "park", "station", "church")
_THINGS = ("book", "ball", "flower", "letter", "cake", "drink", "ring", "key")
_IOI = (
    "When{a} and{b} went to the {place},{s} gave a {thing} to",
    "Then{a} and{b} came to the {place}, and{s} gave a {thing} to",
    "One day{a} and{b} were in the {place}. Then{s} gave the {thing} to",
    "After{a} and{b} had left the {place},{s} handed a {thing} to",
)
_EVENTS = ("war", "siege", "journey", "reign", "trial", "plague", "quarrel", "winter")
_BRACKETS = (("(", ")"), ("[", "]"), ("{", "}"), ("<", ">"))
_BEFORE = ("the house", "my friend", "this book", "the king", "a small dog", "the old road", "his letter")
_INSIDE = ("by the river", "with a red door", "from the north", "as he said", "at last", "in the morning")


def induction(
    *, tokenizer: "transformers.PreTrainedTokenizerBase", samples: int, seed: int, length: int = 16
) -> Behavior:
    """Random tokens with a repeated beginning: `length` distinct tokens, then the first few of them again.

    No text is involved, so every tokenizer with 4 x `length` ordinary tokens will do.
    """
    if length < 8:
        raise CircuitpressError(f"induction: length is {length}: at least 8 tokens make room for two pairs")
    ordinary = ordinary_tokens(tokenizer)
    if len(ordinary) < 4 * length:
        raise Unfit(
            f"induction: the tokenizer has {len(ordinary)} ordinary tokens, {4 * length} are needed; lower `length`"
        )
    draw = random.Random(seed)
    bos = encode("", tokenizer)
    rows = []
    for _ in range(samples):
        first = draw.sample(ordinary, length)
        # A is token k; C comes later, so that neither C nor D is in the repeated part.
        k = draw.randrange(length // 4, length // 2)
        c = draw.randrange(k + 2, length - 1)
        other = list(first)
        other[k], other[c] = first[c], first[k]
        again = first[: k + 1]
        rows.append((bos + first + again, bos + other + again, first[k + 1], first[c + 1]))
    position = torch.tensor([len(row[0]) - 1 for row in rows])
    answer, wrong = (torch.tensor([row[side] for row in rows]) for side in (2, 3))
    clean, corrupted = (pad([row[side] for row in rows]) for side in (0, 1))
    return Behavior("induction", "logit_diff", Pairs(clean, corrupted, position, answer, wrong))


def ioi(*, tokenizer: "transformers.PreTrainedTokenizerBase", seed: int) -> Iterator[Contrast]:
    """Indirect object identification with the names that are single tokens. Refuses with fewer than four."""
    names = [f" {name}" for name in _NAMES if next_token("When", f" {name}", tokenizer) is not None]
    if len(names) < 4:
        found = ", ".join(name.strip() for name in names) or "none"
        raise Unfit(
            f"ioi: four of our {len(set(_NAMES))} names must be single tokens of this tokenizer; found: {found}"
        )
    draw = random.Random(seed)
    while True:
        a, b = draw.sample(names, 2)
        subject, other = (a, b) if draw.random() < 0.5 else (b, a)
        filled = {"place": draw.choice(_PLACES), "thing": draw.choice(_THINGS), "a": a, "b": b}
        template = draw.choice(_IOI)
        yield Contrast(template.format(s=subject, **filled), template.format(s=other, **filled), other, subject)


def greater_than(*, tokenizer: "transformers.PreTrainedTokenizerBase", seed: int) -> Iterator[Contrast]:
    """Years of one century; the answer is the last two digits where they are one token, else the tens digit."""
    probe = "The war lasted from the year 1741 to the year 17"
    digits = next((n for n in (2, 1) if all(next_token(probe, text[:n], tokenizer) for text in ("62", "23", "87"))), 0)
    if not digits:
        raise Unfit("greater_than: this tokenizer splits a year neither as 17|41 nor as 17|4|1")
    draw = random.Random(seed)
    while True:
        event, century, tens = draw.choice(_EVENTS), draw.randrange(11, 19), draw.randrange(2, 8)
        start = f"{tens}{draw.randrange(1, 9)}"
        later = f"{draw.randrange(tens + 1, 10)}{draw.randrange(10)}"
        earlier = f"{draw.randrange(tens)}{draw.randrange(2, 10)}"
        clean, corrupted = (
            f"The {event} lasted from the year {century}{year} to the year {century}" for year in (start, "01")
        )
        yield Contrast(clean, corrupted, later[:digits], earlier[:digits])


def brackets(*, tokenizer: "transformers.PreTrainedTokenizerBase", seed: int) -> Iterator[Contrast]:
    """Closing brackets, of the kinds that are single tokens here."""
    usable = [kind for kind in _BRACKETS if next_token("the house (by the river", kind[1], tokenizer) is not None]
    if len(usable) < 2:
        found = " ".join(close for _, close in usable) or "none"
        raise Unfit(f"brackets: two closing brackets must be single tokens of this tokenizer: {found}")
    draw = random.Random(seed)
    kinds: Sequence[tuple[tuple[str, str], tuple[str, str]]] = list(permutations(usable, 2))
    while True:
        (open_, close), (other_open, other_close) = draw.choice(kinds)
        text = f"{draw.choice(_BEFORE)} {{}}{draw.choice(_INSIDE)} {draw.choice(_BEFORE)}"
        yield Contrast(text.format(open_), text.format(other_open), close, other_close)


def ordinary_tokens(tokenizer: "transformers.PreTrainedTokenizerBase") -> list[int]:
    """Ids that stand for some text of their own: no special tokens, no fragments of characters, no blanks."""
    added = tokenizer.added_tokens_decoder.items()
    special = set(tokenizer.all_special_ids) | {id_ for id_, token in added if token.special}
    result = []
    for id_ in range(len(tokenizer)):
        if id_ in special:
            continue
        text = tokenizer.decode([id_])
        if isinstance(text, str) and text.strip() and "�" not in text:
            result.append(id_)
    return result
