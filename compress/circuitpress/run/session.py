"""One recipe at work in one run folder: the values that stages share, each made when a stage first asks for it."""

import json
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..anatomy import Anatomy, read_anatomy
from ..checkpoint import resolve_checkpoint
from ..console import Console
from ..files import write_bytes_atomic
from ..recipe import Recipe
from ..units import Prices, Probe
from .folder import RunFolder

if TYPE_CHECKING:
    # Whole modules, and dotted names below, so that a checker of types at run time can follow them too.
    import transformers

    import circuitpress.data
    import circuitpress.stream

log = logging.getLogger(__name__)


class Session:
    """One recipe at work in one run folder."""

    def __init__(self, folder: RunFolder, recipe: Recipe, console: Console) -> None:
        self.folder = folder
        self.recipe = recipe
        self.console = console

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    @cached_property
    def checkpoint(self) -> Path:
        """The local folder of the model."""
        return resolve_checkpoint(self.recipe.model)

    @cached_property
    def anatomy(self) -> Anatomy:
        """The model's parts."""
        return read_anatomy(self.checkpoint)

    @cached_property
    def device(self) -> str:
        """Where passes run."""
        return choose_device(self.recipe.run.device)

    @cached_property
    def stream(self) -> "circuitpress.stream.Stream":
        """The original model."""
        return self.open(self.checkpoint)

    def open(self, folder: Path) -> "circuitpress.stream.Stream":
        """Another model, in the run's device and precision."""
        from ..stream import open_stream

        return open_stream(folder, device=self.device, dtype=self.recipe.run.dtype, spill=self.path / "spill")

    @cached_property
    def tokenizer(self) -> "transformers.PreTrainedTokenizerBase":
        """The model's tokenizer."""
        return load_tokenizer(self.checkpoint)

    @cached_property
    def windows(self) -> "tuple[circuitpress.data.Windows, ...]":
        """Calibration, held-out (probes) and test windows, disjoint."""
        from ..data import split

        data, count = self.recipe.data, self.recipe.evaluate.windows
        if data.test is None or data.test == data.calibration:
            everything = self._load(data.calibration, data.samples + 2 * count)
            calibration, held_out, test = split(everything, data.samples, count, count)
        else:
            calibration, held_out = split(self._load(data.calibration, data.samples + count), data.samples, count)
            test = self._load(data.test, count)
        for name, windows in (("calibration", calibration), ("held out", held_out), ("test", test)):
            log.info("%s windows: %s", name, windows.describe())
        return calibration, held_out, test

    def _load(self, path: Path | None, samples: int) -> "circuitpress.data.Windows":
        from ..data import load_windows

        data, anatomy = self.recipe.data, self.anatomy
        length = min(data.length, anatomy.context) if anatomy.context else data.length
        if length < data.length:
            log.warning(
                "windows of %d tokens: the model reads no more at a time (data.length is %d)", length, data.length
            )
        return load_windows(
            path, self.tokenizer, length=length, samples=samples, seed=data.seed, format=data.format, bos=data.bos,
            vocab=anatomy.vocab,
        )  # fmt: skip

    def names(self, formats: Sequence[str]) -> list[str]:
        """Complete format names, without repetition."""
        import torch

        from ..formats import resolve

        dtype = getattr(torch, self.anatomy.dtype)
        group = self.recipe.quantize.group_size
        return list(dict.fromkeys(resolve(name, group_size=group, dtype=dtype) for name in formats))

    @cached_property
    def prices(self) -> Prices:
        """The prices that the score stage saved."""
        return Prices.load(self.path / "prices.safetensors")

    @cached_property
    def probes(self) -> list[Probe]:
        """The probes that the probe stage saved."""
        return [Probe(**entry) for entry in json.loads((self.path / "probes.json").read_text())]

    def write(self, name: str, document: object) -> None:
        """Saves a JSON file of the run."""
        write_bytes_atomic(self.path / name, (json.dumps(document, indent=1) + "\n").encode())


def load_tokenizer(folder: Path) -> "transformers.PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint; CheckpointError if its files are missing or damaged."""
    from transformers import AutoTokenizer

    from ..errors import CheckpointError

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        hint = "put the tokenizer files (tokenizer.json, tokenizer_config.json) into the folder"
        raise CheckpointError(f"{folder}: the tokenizer cannot be loaded: {first}", hint=hint) from error


def choose_device(device: str) -> str:
    """`auto` becomes `cuda` where there is one, else `cpu`."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
