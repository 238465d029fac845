"""Behaviors from files: minimal pairs in BLiMP's form, facts in a table, conversations for chat models.

- `blimp`: JSON lines with `sentence_good` and `sentence_bad` (Warstadt et al., arXiv 1912.00582), a seeded sample.
- `facts`: a CSV with the columns `subject` and `answer`, and a template with `{subject}`. The corrupted prompt asks for
  another subject of equally many tokens, whose answer is the wrong one (Meng et al., arXiv 2202.05262).
- `chat`: YAML pairs of user messages, put through the tokenizer's chat template up to where the assistant begins. What
  is measured is the first token of the reply, so `answer` and `wrong` are ways to begin it.
"""

import csv
import json
import random
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import CircuitpressError
from .build import Contrast, Minimal, Unfit, encode, next_token

if TYPE_CHECKING:
    import transformers

OWN = Path(str(resources.files("circuitpress") / "behaviors" / "chat"))
"""The pairs for chat models that come with circuitpress."""


def blimp(*, folder: Path, seed: int, file: str) -> Iterator[Minimal]:
    """Minimal pairs of a .jsonl in BLiMP's form, in a seeded order."""
    path = folder / file
    rows = [json.loads(line) for line in _read(path).splitlines() if line.strip()]
    try:
        pairs = [Minimal(row["sentence_good"], row["sentence_bad"]) for row in rows]
    except (KeyError, TypeError) as error:
        raise CircuitpressError(f"blimp: {path} has a row without sentence_good and sentence_bad") from error
    random.Random(seed).shuffle(pairs)
    yield from pairs


def facts(
    *,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    folder: Path,
    seed: int,
    file: str,
    template: str = "The capital of {subject} is",
) -> Iterator[Contrast]:
    """Facts whose answers are single tokens, each against all others of its length, in a seeded order."""
    path = folder / file
    rows = list(csv.DictReader(_read(path).splitlines()))
    if "{subject}" not in template:
        raise CircuitpressError(f"facts: template {template!r} does not say where {{subject}} goes")
    if not rows or not all(row.get("subject") and row.get("answer") for row in rows):
        raise CircuitpressError(f"facts: {path} needs rows with the columns subject and answer")
    by_length: dict[int, list[tuple[str, str]]] = {}
    for row in rows:
        prompt, answer = template.format(subject=row["subject"]), f" {row['answer']}"
        if next_token(prompt, answer, tokenizer) is not None:
            by_length.setdefault(len(encode(prompt, tokenizer)), []).append((prompt, answer))
    candidates = [
        Contrast(prompt, other, answer, wrong)
        for known in by_length.values()
        for prompt, answer in known
        for other, wrong in known
        if answer != wrong
    ]
    random.Random(seed).shuffle(candidates)
    yield from candidates


def chat(
    *, tokenizer: "transformers.PreTrainedTokenizerBase", folder: Path, file: str, system: str = ""
) -> Iterator[Contrast]:
    """Conversations of one turn from a YAML file: `answer`, `wrong` and `pairs: [{clean, corrupted}]`.

    A pair may carry its own answers, and `begin`: what the assistant has said so far. A `file` that is not there is
    looked for among those that come with circuitpress: refusal.yaml, sycophancy.yaml, honesty.yaml.
    """
    if not tokenizer.chat_template:
        raise Unfit("chat: the tokenizer has no chat template: this behavior is for chat models")
    path = folder / file
    path = OWN / path.name if (OWN / path.name).is_file() and not path.exists() else path
    try:
        document = yaml.safe_load(_read(path))
    except yaml.YAMLError as error:
        raise CircuitpressError(f"chat: {path} is not YAML: {' '.join(str(error).split())}") from error
    entries = document.get("pairs") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CircuitpressError(f"chat: {path} needs a list `pairs` of {{clean, corrupted}}")
    for entry in entries:
        whole: Mapping[str, Any] = {**document, **entry}
        if missing := [key for key in ("clean", "corrupted", "answer", "wrong") if not isinstance(whole.get(key), str)]:
            raise CircuitpressError(f"chat: {path} has a pair without the text {', '.join(missing)}")
        begin = str(whole.get("begin", ""))
        prompts = [_render(tokenizer, whole[side], system) + begin for side in ("clean", "corrupted")]
        yield Contrast(prompts[0], prompts[1], whole["answer"], whole["wrong"])


def _render(tokenizer: "transformers.PreTrainedTokenizerBase", user: str, system: str) -> str:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": user})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CircuitpressError(
            f"cannot read {path}: {reason}", hint="paths are relative to the behavior file"
        ) from error
