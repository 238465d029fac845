"""A finished model folder as an export sees it: every matrix with its stored value, everything else as it is."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..anatomy import Anatomy, Matrix, family_of, read_anatomy
from ..checkpoint import METHOD, Headers, Weights, read_headers
from ..errors import CheckpointError
from ..formats import Format, parse, split_segments
from ..plan.serving import Stored


@dataclass(frozen=True)
class Source:
    """A model that circuitpress wrote; floating matrices of it are ordinary tensors."""

    anatomy: Anatomy
    headers: Headers
    weights: Weights

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.anatomy.folder

    @property
    def matrices(self) -> dict[str, Matrix]:
        """The matrices of decoder blocks, then embedding and lm_head, by module."""
        inside = [matrix for block in self.anatomy.blocks for matrix in block.matrices]
        return {matrix.module: matrix for matrix in [*inside, *self.anatomy.outer]}

    @property
    def floating_linears(self) -> list[str]:
        """The linear layers that are not packed, lm_head among them, also where it is the embedding's matrix."""
        packed, tables = self.headers.packed, ("embedding", "tied")
        names = [name for name, matrix in self.matrices.items() if name not in packed and matrix.role not in tables]
        return list(dict.fromkeys([*names, "lm_head"]))

    def stored(self) -> dict[str, Stored]:
        """The formats and shape of every matrix of the decoder blocks."""
        return {
            matrix.module: Stored(self.formats(matrix.module), matrix.rows, matrix.cols)
            for block in self.anatomy.blocks
            for matrix in block.matrices
        }

    def formats(self, module: str) -> tuple[str, ...]:
        """The complete names of the formats of a matrix's parts."""
        if entry := self.headers.packed.get(module):
            return tuple(segment["format"] for segment in entry["segments"])
        stored = self.weights.stored_name(f"{module}.weight")
        assert stored is not None  # the anatomy was read from these headers
        return (self.headers.dtype(stored),)

    def value(self, module: str) -> tuple[Format, Any]:
        """The format and quantized value of a packed matrix that is stored in one part."""
        entry = self.headers.packed[module]
        parts = [(parse(s["format"]), s["start"], s["stop"]) for s in entry["segments"]]
        (value,) = split_segments(self.weights.packed(module), entry["shape"], parts, entry["axis"])
        return parts[0][0], value

    def shards(self) -> Iterator[list[str]]:
        """The names in the model of all tensors, those outside the blocks first, then block by block."""
        names = [self.weights.model_name(stored) for stored in self.headers.tensors]
        prefixes = [block.prefix + "." for block in self.anatomy.blocks]
        yield [name for name in names if not name.startswith(tuple(prefixes))]
        for prefix in prefixes:
            yield [name for name in names if name.startswith(prefix)]

    def owner(self, name: str) -> str | None:
        """The packed matrix that a tensor is a part of; None for biases, norms and floating matrices."""
        module, _, part = name.rpartition(".")
        return module if module in self.headers.packed and part != "bias" else None

    def plain(self, module: str) -> Tensor:
        """The numbers that a packed matrix stands for, float32, as an ordinary checkpoint has them."""
        weight = self.weights.decode(module)
        return weight.T.contiguous() if self.matrices[module].transposed else weight


def open_source(folder: Path) -> Source:
    """Reads headers only; CheckpointError if the folder holds no model that circuitpress wrote or pruned."""
    anatomy = read_anatomy(folder, packed_ok=True)
    headers = read_headers(folder, packed_ok=True)
    if headers.rounded_by not in (None, METHOD):
        hint = "export takes what circuitpress run or apply wrote: runs/NAME/model"
        raise CheckpointError(f"{folder} was packed by {headers.rounded_by}", hint=hint)
    return Source(anatomy, headers, Weights(headers, family_of(headers.config).prefix))
