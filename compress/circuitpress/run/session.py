"""One recipe at work in one run folder: the values that stages share, each made when a stage first asks for it."""

import json
import logging
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..anatomy import Anatomy, read_anatomy
from ..checkpoint import resolve_checkpoint
from ..console import Console
from ..files import write_bytes_atomic
from ..recipe import Recipe
from ..units import DROP, Prices, Probe
from ..widths import Widths, full_widths, heads_can_leave, kept
from .folder import RunFolder
from .protect import translate
from .windows import kept_windows

if TYPE_CHECKING:
    # Whole modules, and dotted names below, so that a checker of types at run time can follow them too.
    import transformers

    import circuitpress.data
    import circuitpress.run.keeping
    import circuitpress.stream

log = logging.getLogger(__name__)


class Session:
    """One recipe at work in one run folder."""

    def __init__(self, folder: RunFolder, recipe: Recipe, console: Console) -> None:
        self.folder = folder
        self.recipe = recipe
        self.console = console
        self._anatomies: dict[Path, Anatomy] = {}
        self._streams: dict[Path, Any] = {}

    def branch(self, name: str) -> "Session":
        """A session on a folder inside this one that shares texts and the original: for a candidate."""
        other = Session(RunFolder(self.path / name), self.recipe, self.console)
        vars(other)["windows"] = self.windows
        other._streams[self.checkpoint] = self.original
        return other

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    @cached_property
    def checkpoint(self) -> Path:
        """The local folder of the model."""
        return resolve_checkpoint(self.recipe.model)

    @property
    def working(self) -> Path:
        """The checkpoint that is priced and rounded: what pruning left, or the original."""
        pruned = self.path / "pruned"
        return pruned if (pruned / "config.json").exists() else self.checkpoint

    @property
    def anatomy(self) -> Anatomy:
        """The parts of the checkpoint that is priced and rounded."""
        return self._anatomy_of(self.working)

    @property
    def original_anatomy(self) -> Anatomy:
        """The parts of the original model."""
        return self._anatomy_of(self.checkpoint)

    def _anatomy_of(self, folder: Path) -> Anatomy:
        if folder not in self._anatomies:
            self._anatomies[folder] = read_anatomy(folder)
        return self._anatomies[folder]

    @cached_property
    def device(self) -> str:
        """Where passes run."""
        return choose_device(self.recipe.run.device)

    @property
    def stream(self) -> "circuitpress.stream.Stream":
        """The checkpoint that is priced and rounded."""
        return self._stream_of(self.working)

    @property
    def original(self) -> "circuitpress.stream.Stream":
        """The original model: what results are compared with."""
        return self._stream_of(self.checkpoint)

    def _stream_of(self, folder: Path) -> "circuitpress.stream.Stream":
        if folder not in self._streams:
            self._streams[folder] = self.open(folder)
        return self._streams[folder]

    @cached_property
    def scoring(self) -> "circuitpress.stream.Stream":
        """The checkpoint that is priced and rounded, in a type that is fast rather than exact: for gradients.

        What is measured is a difference of two models, which bfloat16 blurs; a gradient or a second moment is a mean
        over tokens, of which sampling leaves a few percent open. At 64 windows of 256 tokens prices move by 2 to 4 % in
        the median (lab-llama-14m, stories260K, babyllama-105), which is their standard error, and scoring lab-llama-14m
        takes two thirds of the time with AVX512_BF16.
        """
        from ..stream import has_fast_bfloat16, open_stream

        if self.recipe.run.dtype != "auto" or not has_fast_bfloat16(self.device):
            return self.stream
        return open_stream(self.working, device=self.device, dtype="bfloat16", spill=self.path / "spill")

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
        load = partial(
            load_windows, length=length, samples=samples, seed=data.seed, format=data.format, bos=data.bos,
            vocab=anatomy.vocab,
        )  # fmt: skip
        return kept_windows(
            self.path / "windows", self.checkpoint, path, load.keywords, lambda: load(path, self.tokenizer)
        )

    def names(self, formats: Sequence[str]) -> list[str]:
        """Complete format names, without repetition and without `drop`, which is no format of a weight."""
        import torch

        from ..formats import resolve

        dtype = getattr(torch, self.anatomy.dtype)
        group = self.recipe.quantize.group_size
        return list(dict.fromkeys(resolve(name, group_size=group, dtype=dtype) for name in formats if name != DROP))

    @property
    def least_widths(self) -> Widths:
        """The widths of the narrowest model that the recipe admits."""
        full, asked = full_widths(self.original_anatomy), self.recipe.prune
        if DROP in self.recipe.plan.formats:
            return Widths(1, 1 if heads_can_leave(self.original_anatomy) else full.kv_groups)
        return Widths(kept(full.neurons, asked.neurons), kept(full.kv_groups, asked.kv_groups))

    @property
    def pruned(self) -> dict[str, Any] | None:
        """What prune.json says of the units that left; None if all are there."""
        path = self.path / "prune.json"
        document = json.loads(path.read_text()) if path.exists() else {}
        return document if document.get("widths") else None

    @property
    def protect(self) -> tuple[str, ...]:
        """The recipe's protected parts, by the names that they have in the checkpoint that is priced and rounded."""
        patterns = self.recipe.plan.protect
        if not patterns or (pruned := self.pruned) is None:
            return patterns
        stay = {int(layer): kinds for layer, kinds in pruned["stay"].items()}
        return translate(patterns, self.original_anatomy, stay)

    @cached_property
    def kept(self) -> "tuple[circuitpress.run.keeping.Kept, ...]":
        """The behaviors that the recipe wants kept."""
        from .keeping import load_kept

        return load_kept(self) if self.recipe.behaviors else ()

    @cached_property
    def prices(self) -> Prices:
        """The prices that the score stage saved."""
        return Prices.load(self.path / "prices.safetensors")

    @cached_property
    def outer(self) -> Prices | None:
        """The prices of embedding and lm_head; None if they were not priced."""
        path = self.path / "outer.safetensors"
        return Prices.load(path) if path.exists() else None

    def outer_menu(self) -> list[str]:
        """Complete names of the formats that embedding and lm_head are priced in."""
        from ..menu import OUTER_MENU

        named = self.recipe.plan.outer
        return self.names([*OUTER_MENU, *([] if named == "auto" else [named])])

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
