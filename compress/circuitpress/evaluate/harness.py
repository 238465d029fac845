"""Our models inside lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

The harness looks models up by name in a registry that no installed package can add to from outside: somebody has to
register before its command line runs. So `circuitpress lm-eval ...` registers and hands its arguments on, and
`--model circuitpress --model_args pretrained=DIR` then names a folder, a compressed one or an ordinary one.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.models import huggingface
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..checkpoint import resolve_checkpoint

NAME = "circuitpress"
_HFLM: Any = huggingface.HFLM
"""Its decorator hides its signature from type checkers."""


class CircuitpressLM(_HFLM):
    """A folder or Hub id as a harness model; other arguments are those of the harness's own `hf` model.

    `quiet` leaves out the harness's progress bars.
    """

    def __init__(
        self, pretrained: str, *, dtype: str = "auto", device: str | None = None, trust_remote_code: bool = False,
        quiet: bool = False, **arguments: Any,
    ) -> None:  # fmt: skip
        folder = resolve_checkpoint(str(pretrained), trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        cast(Any, model).to(device)
        super().__init__(
            cast(PreTrainedModel, model), device=device, trust_remote_code=trust_remote_code,
            **{"tokenizer": str(folder), **arguments},
        )  # fmt: skip
        self._quiet = quiet

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As the harness does it."""
        return super().loglikelihood(requests, disable_tqdm or self._quiet)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As the harness does it."""
        return super().loglikelihood_rolling(requests, disable_tqdm or self._quiet)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As the harness does it."""
        return super().generate_until(requests, disable_tqdm or self._quiet)


def register() -> None:
    """Makes `--model circuitpress` known to the harness of this process."""
    from lm_eval.api.registry import model_registry

    model_registry.register(NAME, target=CircuitpressLM)


def command_line(arguments: Sequence[str]) -> None:
    """The harness's own command line, with our model in its registry."""
    import sys

    from lm_eval.__main__ import cli_evaluate

    register()
    sys.argv = ["circuitpress lm-eval", *arguments]
    cli_evaluate()
