"""The prompts with which `audit` looks for lost refusals, flattery and lies in chat models, without being asked to.

Quantization can take refusals away: attack success of 0.3 % went up to 85 % (Q-resafe, 2025,
https://arxiv.org/abs/2506.20251). The prompts are those of the files in `chat`; each file gives two
behaviors, since the other side can be lost as well: `refusal` declines what harms, `refusal-contrast` answers the rest.

Only accuracies are asked for, so clean and corrupted prompts need not have equally many tokens here, as they must for
attribution, and of an answer the first token is enough: more prompts fit a tokenizer than in the behaviors of the same
names that `generator: chat` makes.

What is measured is the first word of a reply to a dozen plain prompts. It can show that a refusal is gone; it cannot
show that a model is safe.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from .build import encode, pad
from .generate import LEAST
from .sources import OWN, chat
from .types import Behavior, Pairs

if TYPE_CHECKING:
    import transformers

SETS = ("refusal", "sycophancy", "honesty")


def safety_set(
    tokenizer: "transformers.PreTrainedTokenizerBase", *, unfit: dict[str, str] | None = None
) -> list[Behavior]:
    """The behaviors of `SETS` and their contrasts; none without a chat template. `corrupted` is `clean` in all.

    `unfit` takes the names and reasons of those of which the tokenizer can express fewer than `LEAST` prompts.
    """
    if not tokenizer.chat_template:
        return []
    found = []
    for name in SETS:
        contrasts = list(chat(tokenizer=tokenizer, folder=OWN, file=f"{name}.yaml"))
        sides: Mapping[str, list[tuple[str, str, str]]] = {
            name: [(one.clean, one.answer, one.wrong) for one in contrasts],
            f"{name}-contrast": [(one.corrupted, one.wrong, one.answer) for one in contrasts],
        }
        for side, prompts in sides.items():
            pairs = _pairs(prompts, tokenizer)
            if pairs is not None and len(pairs) >= LEAST:
                about = {"source": f"{name}.yaml", "pairs": len(pairs), "unfit": len(prompts) - len(pairs)}
                found.append(Behavior(side, "logit_diff", pairs, about))
            elif unfit is not None:
                unfit[side] = f"{0 if pairs is None else len(pairs)} prompts fit this tokenizer, {LEAST} are needed"
    return found


def _pairs(prompts: list[tuple[str, str, str]], tokenizer: "transformers.PreTrainedTokenizerBase") -> Pairs | None:
    """Those prompts of (prompt, answer, wrong) behind which the two answers begin with different tokens."""
    rows = []
    for prompt, *answers in prompts:
        before = encode(prompt, tokenizer, special=False)
        behind = [encode(prompt + answer, tokenizer, special=False) for answer in answers]
        aligned = all(ids[: len(before)] == before and len(ids) > len(before) for ids in behind)
        if aligned and behind[0][len(before)] != behind[1][len(before)]:
            rows.append((before, behind[0][len(before)], behind[1][len(before)]))
    if not rows:
        return None
    clean = pad([before for before, _, _ in rows])
    position, answer, wrong = torch.tensor([(len(before) - 1, right, other) for before, right, other in rows]).T
    return Pairs(clean, clean, position, answer, wrong)
