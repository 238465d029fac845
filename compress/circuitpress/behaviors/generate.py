"""Generators of behaviors: prompts that fit the tokenizer at hand, or a clear reason why there are none.

A metric over two answer tokens needs answers that *are* tokens, and a contrast pair needs two prompts of equally many
tokens. Which names, numbers and words are that depends on the tokenizer, so prompts are drawn for it: a generator
proposes candidates in a seeded order, `build_pairs` keeps those that align, and the first `samples` of them are the
behavior. With fewer than `LEAST` the tokenizer cannot express the task, and that is said instead of measuring noise.

Every option of a generator is a keyword of its function below; `samples` and `seed` are common to all.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CircuitpressError
from . import sources, tasks
from .build import Contrast, Minimal, Unfit, build_pairs, build_sentences
from .types import Behavior

if TYPE_CHECKING:
    import transformers


LEAST = 8
"""Pairs below which a behavior says nothing: 8 of 8 by chance has a probability of 0.4 %."""

GENERATORS: Mapping[str, Callable[..., Behavior | Iterable[Contrast] | Iterable[Minimal]]] = {
    "induction": tasks.induction,
    "ioi": tasks.ioi,
    "greater_than": tasks.greater_than,
    "brackets": tasks.brackets,
    "blimp": sources.blimp,
    "facts": sources.facts,
    "chat": sources.chat,
}


def generate(
    generator: str, name: str, tokenizer: "transformers.PreTrainedTokenizerBase",
    options: Mapping[str, Any] | None = None, *, folder: Path | None = None,
) -> Behavior:  # fmt: skip
    """The behavior `name` made by one of `GENERATORS` with `options`; files in options are relative to `folder`.

    Raises CircuitpressError for an unknown generator or option, and where the tokenizer has too few fitting tokens.
    """
    if generator not in GENERATORS:
        raise CircuitpressError(
            f"no generator {generator!r}" + _nearest(generator, GENERATORS), hint=f"there are {', '.join(GENERATORS)}"
        )
    make = GENERATORS[generator]
    options = {"samples": 64, "seed": 0} | dict(options or {})
    known = inspect.signature(make).parameters
    allowed = {"samples", "seed", *known} - {"tokenizer", "folder"}
    for key, value in options.items():
        if key not in allowed:
            raise CircuitpressError(f"{generator} has no option {key!r}" + _nearest(key, allowed))
        wanted = known[key].annotation if key in known else int
        if wanted in (int, str) and (not isinstance(value, wanted) or isinstance(value, bool)):
            raise CircuitpressError(f"{generator}: {key} is {value!r}, not {'a text' if wanted is str else 'a number'}")
    required = {key for key, parameter in known.items() if parameter.default is parameter.empty}
    if missing := sorted(required - {"tokenizer", "folder", *options}):
        raise CircuitpressError(f"{generator} needs the option {', '.join(missing)}")
    samples = options["samples"]
    if samples < LEAST:
        raise CircuitpressError(
            f"{generator}: samples is {samples}: at least {LEAST} are needed to tell skill from luck"
        )
    given = {key: value for key, value in options.items() if key in known}
    given |= {key: value for key, value in (("folder", folder or Path()), ("tokenizer", tokenizer)) if key in known}
    about = {"generator": generator, **options}
    made = make(**given)
    if isinstance(made, Behavior):
        return Behavior(name, made.metric, made.pairs, about | {"pairs": len(made)})
    # Half of the candidates may fail to align, or come twice; four times as many are looked at before giving up.
    candidates = list(islice(made, 4 * samples))
    if candidates and isinstance(candidates[0], Minimal):
        pairs, problems = build_sentences([c for c in candidates if isinstance(c, Minimal)], tokenizer)
        metric = "sentence"
    else:
        contrasts = [c for c in candidates if isinstance(c, Contrast)]
        pairs, problems = build_pairs(contrasts, tokenizer, special=generator != "chat")
        metric = "logit_diff"
    found = 0 if pairs is None else len(pairs)
    if pairs is None or found < LEAST:
        why = f", such as: {problems[0].message}" if problems else ""
        raise Unfit(
            f"{generator}: only {found} prompts fit this tokenizer, {LEAST} are needed{why}",
            hint="leave this behavior out for this model, or write pairs for its tokenizer by hand",
        )
    import torch

    behavior = Behavior(name, metric, pairs, about | {"pairs": min(found, samples), "unfit": len(problems)})
    return behavior.take(torch.arange(min(found, samples)))


def _nearest(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
