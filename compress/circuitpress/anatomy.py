"""Which parts a model has, from config.json and safetensors headers alone: blocks, matrices, heads, neurons.

Every supported architecture is one row of `_FAMILIES`: where its decoder blocks live and what role each matrix plays. A
checkpoint is placed by matching the two-dimensional tensors of its blocks against that row; one that cannot be placed
is an error that names it, since a matrix that nobody prices would silently stay uncompressed.

Query head h reads key-value head h // (heads / kv_heads). Rows are outputs and columns inputs everywhere, also where
the checkpoint stores the transpose (GPT-2's Conv1D).
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .checkpoint import Headers, read_headers
from .errors import CheckpointError
from .units import UnitId


@dataclass(frozen=True)
class Matrix:
    """One linear map of a decoder block, y[rows] = W[rows, cols] x[cols], or a matrix outside the blocks.

    `role` is q, k, v, qkv, o, gate, up or down; outside the blocks embedding, head or tied (both in one matrix).
    """

    module: str
    role: str
    rows: int
    cols: int
    transposed: bool

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.rows * self.cols


@dataclass(frozen=True)
class Block:
    """One decoder block; `prefix` is its module name, such as `model.layers.3`."""

    index: int
    prefix: str
    matrices: tuple[Matrix, ...]
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int

    def local(self, matrix: Matrix) -> str:
        """The name of a matrix's module inside the block."""
        return matrix.module.removeprefix(self.prefix + ".")

    def role(self, role: str) -> Matrix:
        """The matrix that plays `role`."""
        return next(matrix for matrix in self.matrices if matrix.role == role)

    def units(self) -> tuple[UnitId, ...]:
        """All heads, then all key-value groups, then all neurons."""
        counts = {"head": self.heads, "kv_group": self.kv_heads, "neuron": self.neurons}
        return tuple(UnitId(self.index, kind, i) for kind, n in counts.items() for i in range(n))  # pyright: ignore


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model; sizes in weights and bytes. `dtype` is the type of the linear weights on disk.

    `outer` are the embedding and lm_head, one matrix if they are tied; `outer_bytes` what they take. `original_numel`
    is the number of linear weights before pruning, None for a model that was never pruned.
    """

    folder: Path
    model_type: str
    dtype: str
    hidden: int
    vocab: int
    context: int
    tied: bool
    blocks: tuple[Block, ...]
    linear_bytes: int
    other_bytes: int
    file_bytes: int
    outer: tuple[Matrix, ...]
    outer_bytes: int
    original_numel: int | None = None

    @property
    def linear_numel(self) -> int:
        """Number of linear weights in all decoder blocks, those included that pruning took away."""
        return self.original_numel or self.present_numel

    @property
    def present_numel(self) -> int:
        """Number of linear weights that are there; it differs from `linear_numel` in pruned models only."""
        return sum(matrix.numel for block in self.blocks for matrix in block.matrices)

    @property
    def work(self) -> tuple[int, ...]:
        """Linear weights of each block, by which the time of a walk goes."""
        return tuple(sum(matrix.numel for matrix in block.matrices) for block in self.blocks)

    @property
    def bits_per_weight(self) -> float:
        """8 x linear_bytes / linear_numel."""
        return 8 * self.linear_bytes / self.linear_numel

    @property
    def header_bytes(self) -> int:
        """An upper bound on what the headers of a packed model's files take: a shard a block, 4 tensors a matrix.

        An entry is a name and about 90 bytes of type, shape and offsets.
        """
        matrices = [*self.outer, *(matrix for block in self.blocks for matrix in block.matrices)]
        entries = sum(4 * (len(matrix.module) + 100) for matrix in matrices)
        return entries + 128 * (len(self.blocks) + 1)

    def units(self) -> tuple[UnitId, ...]:
        """The units of all blocks in order."""
        return tuple(unit for block in self.blocks for unit in block.units())

    def to_json(self) -> dict[str, Any]:
        """The content of anatomy.json."""
        return asdict(self) | {"folder": str(self.folder), "linear_numel": self.linear_numel}


@dataclass(frozen=True)
class Family:
    """How one architecture names its parts: blocks, final norm, embedding; `roles` maps a role to a block's module."""

    blocks: str
    norm: str
    embedding: str
    roles: Mapping[str, str]
    transposed: bool = False
    head: str = "lm_head"

    @property
    def prefix(self) -> str:
        """The base prefix of tensor names, such as `model.`."""
        return self.blocks.split(".")[0] + "."


_LLAMA = Family(
    "model.layers",
    "model.norm",
    "model.embed_tokens",
    {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
)
_GPT2 = Family(
    "transformer.h",
    "transformer.ln_f",
    "transformer.wte",
    {"qkv": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
    transposed=True,
)
_FAMILIES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "gpt2": _GPT2}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config's `model_type`; CheckpointError names the ones there are."""
    model_type = config.get("model_type", "(none)")
    if model_type not in _FAMILIES:
        hint = f"supported are {', '.join(sorted(_FAMILIES))}"
        raise CheckpointError(f"model type {model_type!r} is not supported", hint=hint)
    return _FAMILIES[model_type]


def read_anatomy(folder: Path, *, packed_ok: bool = False) -> Anatomy:
    """Places every matrix of a checkpoint; reads no weights.

    `packed_ok` admits a model that circuitpress or bitsandbytes packed. Raises CheckpointError, which names the first
    module that could not be placed when the architecture is unknown.
    """
    headers = read_headers(folder, packed_ok=packed_ok)
    config = headers.config
    if config.get("model_type") not in _FAMILIES:
        raise CheckpointError(
            f"{folder}: model type {config.get('model_type')!r} is not supported: {_stranger(headers)}",
            hint=f"supported are {', '.join(sorted(_FAMILIES))}",
        )
    family = family_of(config)
    depth = _size(headers, "num_hidden_layers", "n_layer")
    blocks = tuple(_place_block(headers, family, index) for index in range(depth))
    _refuse_strangers(headers, family, blocks)
    modules = [matrix.module for block in blocks for matrix in block.matrices]
    linear_bytes = sum(_module_bytes(headers, family, module) for module in modules)
    first = modules[0]
    dtype = _original_dtype(headers, family, first)
    context = config.get("max_position_embeddings", config.get("n_positions", 0))
    outer = _place_outer(headers, family)
    return Anatomy(
        folder=folder,
        model_type=config["model_type"],
        dtype=dtype,
        hidden=_size(headers, "hidden_size", "n_embd"),
        vocab=_size(headers, "vocab_size"),
        context=context,
        tied=config.get("tie_word_embeddings", family is _GPT2),
        blocks=blocks,
        linear_bytes=linear_bytes,
        other_bytes=headers.file_bytes - linear_bytes,
        file_bytes=headers.file_bytes,
        outer=outer,
        outer_bytes=sum(_module_bytes(headers, family, matrix.module) for matrix in outer),
        original_numel=(config.get("circuitpress") or {}).get("linear_numel"),
    )


def _place_block(headers: Headers, family: Family, index: int) -> Block:
    prefix = f"{family.blocks}.{index}"
    heads = _size(headers, "num_attention_heads", "n_head")
    matrices: dict[str, Matrix] = {}
    for role, local in family.roles.items():
        module = f"{prefix}.{local}"
        rows, cols = _matrix_shape(headers, family, module)
        matrices[role] = Matrix(module, role, rows, cols, family.transposed)
    # From the shapes: what a config.json leaves out has another default in every architecture.
    head_dim = matrices["o"].cols // heads
    kv_heads = matrices["k"].rows // head_dim if "k" in matrices else heads
    return Block(index, prefix, tuple(matrices.values()), heads, kv_heads, head_dim, matrices["down"].cols)


def _place_outer(headers: Headers, family: Family) -> tuple[Matrix, ...]:
    """Embedding and lm_head; one matrix where the checkpoint stores no lm_head of its own."""
    vocab, hidden = _matrix_shape(headers, replace(family, transposed=False), family.embedding)
    stored = [family.embedding]
    if family.head in headers.packed or f"{family.head}.weight" in headers.tensors:
        stored.append(family.head)
    roles = ("embedding", "head") if len(stored) == 2 else ("tied",)
    return tuple(Matrix(module, role, vocab, hidden, False) for module, role in zip(stored, roles, strict=True))


def _size(headers: Headers, *names: str) -> int:
    """A number in config.json, under the first of `names` that is there."""
    for name in names:
        if isinstance(value := headers.config.get(name), int):
            return value
    hint = "the checkpoint's config.json is damaged: download it again"
    raise CheckpointError(f"{headers.folder / 'config.json'} has no {names[0]}", hint=hint)


def _matrix_shape(headers: Headers, family: Family, module: str) -> tuple[int, int]:
    if module in headers.packed:
        rows, cols = headers.packed[module]["shape"]
        return rows, cols
    if module in headers.foreign:
        rows, cols, _ = headers.foreign[module]
        return rows, cols
    header = headers.tensors.get(_stored(headers, family, f"{module}.weight"))
    if header is None or len(header.shape) != 2:
        raise CheckpointError(
            f"{headers.folder}: module {module} could not be placed: "
            + ("there is no such weight" if header is None else f"its weight has shape {header.shape}"),
            hint="the checkpoint does not match its config.json: download it again",
        )
    rows, cols = header.shape
    return (cols, rows) if family.transposed else (rows, cols)


def _stored(headers: Headers, family: Family, name: str) -> str:
    return name if name in headers.tensors else name.removeprefix(family.prefix)


def _module_bytes(headers: Headers, family: Family, module: str) -> int:
    """Bytes of the matrix in whatever tensors its formats store it: of all the module has but its bias."""
    prefix = _stored(headers, family, f"{module}.weight").removesuffix("weight")
    own = ((name.removeprefix(prefix), header) for name, header in headers.tensors.items() if name.startswith(prefix))
    return sum(header.nbytes for part, header in own if part.startswith("weight") or part != "bias" and "." not in part)


def _original_dtype(headers: Headers, family: Family, module: str) -> str:
    if headers.packed or headers.foreign:
        return headers.config.get("dtype") or headers.config.get("torch_dtype") or "float32"
    return headers.dtype(_stored(headers, family, f"{module}.weight"))


def _refuse_strangers(headers: Headers, family: Family, blocks: tuple[Block, ...]) -> None:
    """A matrix inside a block that no role claims would stay uncompressed in silence."""
    known = {_stored(headers, family, f"{matrix.module}.weight") for block in blocks for matrix in block.matrices}
    inside = re.compile(rf"({re.escape(family.prefix)})?{re.escape(family.blocks.removeprefix(family.prefix))}\.\d+\.")
    for name, header in headers.tensors.items():
        matrix = len(header.shape) >= 2 and header.dtype in ("F32", "F16", "BF16")
        # Old GPT-2 checkpoints carry the causal mask as a tensor [1, 1, n, n].
        if matrix and inside.match(name) and name not in known and not name.endswith((".attn.bias", ".masked_bias")):
            raise CheckpointError(
                f"{headers.folder}: module {name.removesuffix('.weight')} (shape {header.shape}) could not be placed",
                hint=f"blocks of {headers.config['model_type']} have {', '.join(family.roles.values())}",
            )


def _stranger(headers: Headers) -> str:
    """Names the first matrix of a block that does not look like a Llama block's."""
    for name, header in sorted(headers.tensors.items()):
        found = re.fullmatch(r"(.+?\.\d+)\.(.+)\.weight", name)
        if found and len(header.shape) >= 2 and found[2] not in _LLAMA.roles.values():
            return f"module {found[1]}.{found[2]} (shape {header.shape}) could not be placed"
    return "its blocks look like Llama's, but nobody has checked that it computes the same"
