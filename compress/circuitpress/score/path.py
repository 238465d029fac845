"""Path patching: what one unit tells another one directly. Evidence: causal.

The effect of the direct path from a sender to a receiver (Goldowsky-Dill et al., arXiv 2304.05969; Wang et al., arXiv
2211.00593, appendix B): the receiver computes from an input in which the sender's part alone is that of the corrupted
prompt, every other unit in between is held at its clean value, and then the rest of the model runs freely.

1. Where the sender's block is resident, its change of the residual stream d = (z' - z) W[:, columns] is formed.
2. Frozen units pass nothing on, so d reaches the receiver's block unchanged: its input is the clean one plus d. A head
   receives through all of queries, keys and values, or through one `part` of them; a neuron behind the clean heads of
   its block. `receiver=None` stands for the logits: d is added to the final residual stream.
3. The receiver's activation from that input is put into the clean run.

Paths ride one walk over the weights. Two units exchange nothing if the receiver does not come later.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..behaviors import Behavior
from ..console import Advance, ignore
from ..hooks import emit, gate, unit_columns, weight_of
from ..stream import Stream
from ..units import UnitId
from .attribution import Part, exchanged
from .patching import Edit, measure_edits
from .walk import Inputs, Site, read_sites, replaced_sites


@dataclass(frozen=True)
class Path:
    """A direct path; `receiver` None is the logits, `part` narrows a receiving head to one of its inputs."""

    sender: UnitId
    receiver: UnitId | None = None
    part: Part | None = None

    def __str__(self) -> str:
        end = "logits" if self.receiver is None else str(self.receiver)
        return f"{self.sender} -> {end}{f'.{self.part}' if self.part else ''}"


@dataclass(frozen=True)
class PathEffects:
    """metric(path patched) - metric(clean) of every path: mean over pairs and its standard error."""

    paths: tuple[Path, ...]
    values: NDArray[np.float64]
    stderr: NDArray[np.float64]
    evidence: str = "causal"
    provenance: dict[str, Any] = field(default_factory=dict)


def patch_paths(stream: Stream, behavior: Behavior, paths: Sequence[Path], *, advance: Advance = ignore) -> PathEffects:
    """The exact effect of each direct path alone. ValueError for a path that cannot carry anything."""
    for path in paths:
        _check(stream, path)
    changes: dict[str, list[Tensor]] = {}

    def edits(index: int, module: nn.Module, inputs: Inputs) -> Mapping[str, Edit]:
        place = stream.anatomy.blocks[index]
        sending = [path for path in paths if path.sender.layer == index]
        if sending:
            values = list(replaced_sites(stream, behavior, module, place, inputs, "resample"))
            for path in sending:
                role, columns = unit_columns(place, path.sender.kind, path.sender.index)
                site: Site = "o" if role == "o" else "down"
                weight = weight_of(module, place, place.role(role))[:, columns]
                gaps = [(other[site] - z[site])[..., columns] for z, other in values]
                changes[str(path)] = [gap @ weight.T for gap in gaps]
        found: dict[str, Edit] = {}
        for path in paths:
            at = index if path.receiver is None and index == stream.depth - 1 else getattr(path.receiver, "layer", None)
            if at == index:
                found[str(path)] = _arrival(stream, index, module, inputs, path, changes[str(path)])
        return found

    before, after = measure_edits(stream, behavior, edits, advance=advance)
    effects = torch.stack([after[str(path)] - before for path in paths])
    spread = effects.std(1) / effects.shape[1] ** 0.5 if effects.shape[1] > 1 else effects[:, 0] * float("nan")
    about = {"behavior": behavior.name, "metric": behavior.metric, "change": "resample", "prompts": behavior.provenance}
    return PathEffects(tuple(paths), effects.mean(1).numpy(), spread.numpy(), provenance=about)


def _check(stream: Stream, path: Path) -> None:
    for unit in (path.sender, path.receiver):
        if unit is not None and not 0 <= unit.layer < stream.depth:
            raise ValueError(f"{unit} does not exist: the model has layers 0 to {stream.depth - 1}")
        if unit is not None:
            unit_columns(stream.anatomy.blocks[unit.layer], unit.kind, unit.index)
    receiver = path.receiver
    if receiver is None:
        return
    behind = receiver.layer > path.sender.layer
    inside = receiver.layer == path.sender.layer and receiver.kind == "neuron" and path.sender.kind != "neuron"
    if not behind and not inside:
        raise ValueError(f"{path} carries nothing: the receiver does not come after the sender")
    if path.part is not None and receiver.kind == "neuron":
        raise ValueError(f"{path}: a neuron has one input, not a {path.part}")


def _arrival(
    stream: Stream, index: int, module: nn.Module, inputs: Inputs, path: Path, change: Sequence[Tensor]
) -> Edit:
    """The edit of the receiver's block; `change[b]` [batch, length, hidden] is what the sender adds to the stream."""
    place, receiver = stream.anatomy.blocks[index], path.receiver
    down = place.local(place.role("down"))
    if receiver is None:
        # What `down` puts out enters the final residual stream as it is.
        return lambda b: emit(module, down, lambda y: y + change[b])
    role, columns = unit_columns(place, receiver.kind, receiver.index)
    o = place.local(place.role("o"))

    def received(b: int) -> Tensor:
        clean = inputs("clean", b)
        z = read_sites(stream, module, place, clean)["o"]
        if receiver.layer == path.sender.layer:
            # The change enters behind attention: what `o` puts out carries it to the MLP of the same block.
            with emit(module, o, lambda y: y + change[b]):
                return read_sites(stream, module, place, clean)["down"]
        if role == "down":
            with gate(module, o, lambda _: z):
                return read_sites(stream, module, place, clean + change[b])["down"]
        if path.part is None:
            return read_sites(stream, module, place, clean + change[b])["o"]
        with exchanged(stream, module, place, path.part, clean + change[b]):
            return read_sites(stream, module, place, clean)["o"]

    @contextmanager
    def edit(b: int) -> Iterator[None]:
        value = received(b)
        with gate(module, o if role == "o" else down, _put(columns, value)):
            yield

    return edit


def _put(columns: slice, value: Tensor) -> Callable[[Tensor], Tensor]:
    def rewrite(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., columns] = value[..., columns]
        return x

    return rewrite
