"""Opens what the microscope looks at: a model as a stream, its tokenizer and windows of text, without a run folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint import resolve_checkpoint
from .session import choose_device, load_tokenizer

if TYPE_CHECKING:
    import transformers

    import circuitpress.data
    import circuitpress.stream


@dataclass(frozen=True)
class Opened:
    """A model and what is needed to show its tokens."""

    stream: "circuitpress.stream.Stream"
    tokenizer: "transformers.PreTrainedTokenizerBase"

    @property
    def decode(self) -> Callable[[int], str]:
        """A token id to the text it stands for."""
        return lambda token: str(self.tokenizer.decode([token]))

    @property
    def special(self) -> tuple[int, ...]:
        """Ids that no text contains."""
        return tuple(token for token in self.tokenizer.all_special_ids if token < self.stream.anatomy.vocab)

    def windows(self, text: Path | None, *, samples: int, length: int, seed: int = 0) -> "circuitpress.data.Windows":
        """At most `samples` windows of at most `length` tokens; without a text, of the one that comes in the wheel."""
        from ..data import load_windows

        anatomy = self.stream.anatomy
        length = min(length, anatomy.context or length)
        return load_windows(text, self.tokenizer, length=length, samples=samples, seed=seed, vocab=anatomy.vocab)


def open_model(model: str, *, device: str | None, spill: Path | None) -> Opened:
    """A checkpoint folder or Hub id; hidden states that do not fit in memory go to `spill`."""
    from ..stream import open_stream

    folder = resolve_checkpoint(model)
    return Opened(open_stream(folder, device=choose_device(device or "auto"), spill=spill), load_tokenizer(folder))
