"""The one engine that walks a model block by block, so that a model larger than memory is the normal case.

1. The model is built on the meta device; only embeddings, the final norm and lm_head are loaded and stay.
2. Every decoder block of the skeleton is replaced by a recorder. Running the skeleton once per shape of batch yields
   the first hidden states and the exact arguments (masks, rotary tables) that transformers passes to each block, for
   any architecture and without copying its forward pass.
3. `block(i)` makes one block resident: its weights are read (decoded, if packed), checked for NaN, used, and let go.
4. `forward` walks up: each block's inputs are kept in a `Store`, which spills to disk beyond a memory limit.
5. `backward` walks down: the gradient at a block's output is pulled back to its input by recomputing the block, so no
   more than one block's activations of one micro-batch exist at a time.

Scoring, pricing, applying and evaluating all ride these two walks. accelerate's device maps do the forward half, but
not the recomputation, and it keeps no account of block inputs.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import Anatomy, Block, family_of, read_anatomy
from .checkpoint import Weights, read_headers
from .errors import CheckpointError
from .hooks import self_test
from .store import Store, return_freed_memory

Around = Callable[[int, int, nn.Module], contextlib.AbstractContextManager[None]]
"""Called with a block's index, a micro-batch's and the resident block: the context in which the block runs on it."""
Visit = Callable[[int, nn.Module, Callable[[int], Tensor]], None]
"""Called with a block's index, the resident block and `inputs(b)`, the block's input for micro-batch b."""


class _Recorder(nn.Module):
    """Stands in for a decoder block: keeps the arguments it was called with and returns its input."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden, self.arguments = hidden, (args, kwargs)
        return hidden


class Stream:
    """A causal language model of which at most one decoder block is in memory. Made by `open_stream`."""

    def __init__(
        self, model: nn.Module, norm: nn.Module, blocks: Sequence[nn.Module], recorders: Sequence[_Recorder],
        weights: Weights, anatomy: Anatomy, device: torch.device, spill: Path | None, batch_tokens: int,
    ) -> None:  # fmt: skip
        self.anatomy = anatomy
        self.device = device
        self.dtype: torch.dtype = next(model.get_output_embeddings().parameters()).dtype  # pyright: ignore
        self.batch_tokens = batch_tokens
        self._spill = spill
        self._model = model
        self._norm = norm
        self._blocks = blocks
        self._recorders = recorders
        self._weights = weights
        self._tested = False
        self._shape: tuple[int, ...] | None = None

    @property
    def depth(self) -> int:
        """Number of decoder blocks."""
        return len(self._blocks)

    def store(self, name: str) -> Store:
        """A place for hidden states, in memory up to a limit, then in the spill folder."""
        return Store(None if self._spill is None else self._spill / name)

    def batches(self, windows: Tensor) -> list[Tensor]:
        """Cuts windows [n, length] into micro-batches of about `batch_tokens` tokens."""
        per = max(1, self.batch_tokens // windows.shape[1])
        return list(windows.split(per)) if len(windows) else []

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """The input of block 0 for token ids [batch, length]: [batch, length, hidden]."""
        base = self._model.base_model
        assert isinstance(base, nn.Module)
        base(input_ids=ids.to(self.device), use_cache=False)
        self._shape = tuple(ids.shape)
        hidden = self._recorders[0].hidden
        assert hidden is not None
        return hidden

    def run(self, index: int, module: nn.Module, hidden: Tensor) -> Tensor:
        """The output of resident block `index` for `hidden` [batch, length, hidden]."""
        if self._shape != tuple(hidden.shape[:2]):
            self.embed(torch.zeros(hidden.shape[:2], dtype=torch.long))
        args, kwargs = self._recorders[index].arguments
        output = module(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states [..., hidden] to logits [..., vocab] in float32."""
        return self.head(self.normed(hidden)).float()

    def head(self, normed: Tensor) -> Tensor:
        """States [..., hidden] after the final norm to logits [..., vocab], in the compute type."""
        return self._model.get_output_embeddings()(normed)  # pyright: ignore

    def normed(self, hidden: Tensor) -> Tensor:
        """Final hidden states [..., hidden] after the final norm: what lm_head reads."""
        return self._norm(hidden)

    def outer_weight(self, module: str) -> Tensor:
        """The weights [vocab, hidden] of the embedding or of lm_head, by module name."""
        weight = self._model.get_submodule(module).weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    @contextlib.contextmanager
    def outer(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Swaps embedding and lm_head (module name -> [vocab, hidden]); a tied matrix is swapped at both ends."""
        ends = [self._model.get_input_embeddings(), self._model.get_output_embeddings()]  # pyright: ignore
        old = [end.weight for end in ends]
        try:
            for name, weight in weights.items():
                before = self._model.get_submodule(name).weight
                new = nn.Parameter(weight.to(self.device, self.dtype), requires_grad=False)
                for end in ends:
                    if end.weight is before:
                        end.weight = new
            yield
        finally:
            for end, weight in zip(ends, old, strict=True):
                end.weight = weight

    @contextlib.contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights in memory; they are let go at the end of the context."""
        module, place = self._blocks[index], self.anatomy.blocks[index]
        state = {name: self._read(place, name) for name in module.state_dict()}
        module.load_state_dict(state, strict=True, assign=True)
        module.requires_grad_(False).eval()
        del state
        try:
            if not self._tested:
                self._tested = True
                hidden = self.embed(torch.arange(4)[None] % self.anatomy.vocab)
                self_test(module, place, lambda h: self.run(index, module, h), hidden)
            yield module
        finally:
            module.to("meta")
            return_freed_memory()

    def _read(self, place: Block, name: str) -> Tensor:
        module, _, part = name.rpartition(".")
        full = f"{place.prefix}.{module}"
        if part == "weight" and self._weights.is_packed(full):
            tensor = self._weights.decode(full)
            tensor = tensor.T.contiguous() if place.matrices[0].transposed else tensor
        else:
            tensor = self._weights.read(f"{place.prefix}.{name}")
        return tensor.to(self.device, self.dtype)


def has_fast_bfloat16(device: str) -> bool:
    """Whether bfloat16 is twice as fast as float32 on `device`: GPUs from Ampere on, CPUs with AMX or AVX512_BF16."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)  # not before Ampere
    if device != "cpu":
        return False
    known = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.13; before, float32 is always right
    return bool(known.get("amx_bf16") or known.get("avx512_bf16"))


def open_stream(
    folder: Path,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    spill: Path | None = None,
    batch_tokens: int | None = None,
) -> Stream:
    """Opens a checkpoint folder (dense, or packed by circuitpress) without reading its blocks.

    `dtype` is the compute type: `auto` is float32 up to 300 million linear weights (KL between 16-bit models of that
    size is blurred by rounding: on a 14 M model bfloat16 compute alone costs more than int8 weights) and the
    checkpoint's own type above, where float32 takes seven times as long on a CPU with AMX. `spill` is a folder for
    hidden states that do not fit in memory. `batch_tokens` is the size of a micro-batch; by default the widest
    activation of a block holds at most 4 million numbers. Raises CheckpointError.
    """
    import transformers

    anatomy = read_anatomy(folder, packed_ok=True)
    headers = read_headers(folder, packed_ok=True)
    family = family_of(headers.config)
    name = dtype if dtype != "auto" else ("float32" if anatomy.linear_numel <= 300_000_000 else anatomy.dtype)
    compute = getattr(torch, name)
    config = transformers.AutoConfig.from_pretrained(folder)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=compute, attn_implementation="sdpa")
    parent = model.get_submodule(family.blocks.rpartition(".")[0])
    leaf = family.blocks.rpartition(".")[2]
    blocks = list(model.get_submodule(family.blocks))
    recorders = [_Recorder() for _ in blocks]
    setattr(parent, leaf, nn.ModuleList(recorders))
    weights = Weights(headers, family.prefix)
    where = torch.device(device)
    widest = max(max(matrix.rows, matrix.cols) for block in anatomy.blocks for matrix in block.matrices)
    batch_tokens = batch_tokens or max(256, min(4096, (1 << 22) // widest))
    for path, module in model.named_modules():
        _materialise(path, module, model, weights, where, compute)
    return Stream(
        model.eval(), model.get_submodule(family.norm), blocks, recorders, weights, anatomy, where, spill, batch_tokens
    )


def _materialise(
    path: str, module: nn.Module, model: nn.Module, weights: Weights, device: torch.device, dtype: torch.dtype
) -> None:
    """Gives a module outside the blocks its weights, and recomputes buffers that no checkpoint stores."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        full = f"{path}.{name}"
        if not parameter.is_meta:
            continue
        if weights.stored_name(full) is None and module is model.get_output_embeddings():  # pyright: ignore
            module.weight = model.get_input_embeddings().weight  # pyright: ignore
        else:
            packed = name == "weight" and weights.is_packed(path)
            value = (weights.decode(path) if packed else weights.read(full)).to(device, dtype)
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
        fresh = type(module)(config=model.config)  # pyright: ignore
        for name, buffer in fresh.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), persistent=False)


def forward(
    stream: Stream, batches: Sequence[Tensor], store: Store, *, keep: bool = False, visit: Visit | None = None,
    around: Around | None = None, advance: Callable[[float, str], None] | None = None,
) -> None:  # fmt: skip
    """Walks micro-batches of token ids up through all blocks; `store` ends with the final hidden states.

    `store` holds key (i, b): the input of block i for micro-batch b; (depth, b) is the output of the last block. With
    `keep` all of them stay for a later `backward`. `visit` sees every block while it is resident, and what a block does
    with a micro-batch happens in the context that `around` gives.
    """
    with torch.no_grad():
        for b, ids in enumerate(batches):
            store.put((0, b), stream.embed(ids))
        for i in range(stream.depth):
            with stream.block(i) as module:
                if visit is not None:
                    visit(i, module, lambda b, i=i: store.get((i, b), stream.device))
                for b in range(len(batches)):
                    with around(i, b, module) if around else contextlib.nullcontext():
                        hidden = stream.run(i, module, store.get((i, b), stream.device))
                    if not bool(hidden.isfinite().all()):
                        raise CheckpointError(
                            f"block {i} of {stream.anatomy.folder} computes NaN or infinity in {stream.dtype}",
                            hint="set run.dtype to float32",
                        )
                    store.put((i + 1, b), hidden)
                    if not keep:
                        store.drop((i, b))
            if advance is not None:
                advance(1, f"block {i}")


def backward(stream: Stream, store: Store, batches: int, visit: Visit) -> None:
    """Walks down: `visit` must turn the gradients that it keeps from block i's output into those at its input.

    `store` holds the inputs of every block for all micro-batches (from `forward` with `keep`); `visit` gets `inputs(b)`
    as in `forward`.
    """
    for i in reversed(range(stream.depth)):
        with stream.block(i) as module:
            visit(i, module, lambda b, i=i: store.get((i, b), stream.device))
        for b in range(batches):
            store.drop((i + 1, b))
