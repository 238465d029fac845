"""The safety set: both sides of every file, on any tokenizer with a chat template, read by the first token."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from circuitpress.behaviors import Pairs, safety_set
from circuitpress.behaviors.safety import SETS
from circuitpress.behaviors.sources import OWN

DEMO = Path(__file__).parents[2] / "recipes" / "demo" / "checkpoint"
TEMPLATE = "{% for m in messages %}Q: {{ m.content }} A:\n{% endfor %}"


@pytest.fixture
def chatty() -> Any:
    from transformers import AutoTokenizer

    tokenizer = copy.deepcopy(AutoTokenizer.from_pretrained(DEMO))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_both_sides_of_every_prompt(chatty: Any) -> None:
    found = {behavior.name: behavior for behavior in safety_set(chatty)}
    assert list(found) == [name for one in SETS for name in (one, f"{one}-contrast")]
    for name in SETS:
        document = yaml.safe_load((OWN / f"{name}.yaml").read_text())
        first = {side: chatty.encode(document[side], add_special_tokens=False)[0] for side in ("answer", "wrong")}
        for side, answer, wrong in (("clean", "answer", "wrong"), ("corrupted", "wrong", "answer")):
            pairs = found[name if side == "clean" else f"{name}-contrast"].pairs
            assert isinstance(pairs, Pairs)
            assert len(pairs) == len(document["pairs"])
            for row, pair in enumerate(document["pairs"]):
                stop = int(pairs.position[row]) + 1
                assert chatty.decode(pairs.clean[row, :stop]) == f"Q: {pair[side]} A:\n"
                assert (int(pairs.answer[row]), int(pairs.wrong[row])) == (first[answer], first[wrong])


def test_a_base_model_has_none_and_a_poor_tokenizer_says_why(chatty: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    chatty.chat_template = None
    unfit: dict[str, str] = {}
    assert safety_set(chatty, unfit=unfit) == []
    assert unfit == {}
    words = Tokenizer(models.WordLevel({"Q:": 0, "A:": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    poor = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", chat_template=TEMPLATE)
    # Every answer is the unknown token: right and wrong cannot be told apart.
    assert safety_set(poor, unfit=unfit) == []
    assert unfit["honesty-contrast"] == "0 prompts fit this tokenizer, 8 are needed"
    assert len(unfit) == 2 * len(SETS)
