"""The key-value cache of a model in few bits: a number of bits for the keys and the values of every KV head.

1. The last tokens, `WINDOW` to `WINDOW + GROUP - 1`, stay in 16 bits: nearly all heads look there first.
2. Older ones are packed, `GROUP` at a time and once, so that nothing is rounded twice (`circuitpress_kernels.kv`).
3. Attention gets all keys and values in the compute type: those of one layer exist at a time. A prompt attends to its
   own keys as they are; what is packed is seen from the next step on.

    from circuitpress.runtime.cache import make_cache
    model.generate(**inputs, past_key_values=make_cache(model))

The bits are in `config.json` of the model under `circuitpress_cache`, where `circuitpress cache` writes them. Layers
that transformers gives a sliding window or a recurrent state keep transformers' own: their size is bounded.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from circuitpress_kernels.kv import (
    WIDTHS,
    CacheForm,
    CacheRows,
    bytes_with_scales,
    head_table,
    pack_cache,
    read_cache,
)

from ..errors import CheckpointError

SIDES = ("keys", "values")
KEY = "circuitpress_cache"
"""Where config.json holds the bits."""
WINDOW = 32
"""Tokens that stay in 16 bits, at least."""
GROUP = 64
"""Tokens that are packed at once, and share a scale. 32 lose a quarter less for half a bit more, with which codes lose
half; 128 are as good for their bytes, but leave more tokens in 16 bits."""
VERSION = 1


class LayerBits(NamedTuple):
    """Bits of the keys and of the values of each KV head of a layer."""

    keys: tuple[int, ...]
    values: tuple[int, ...]


def form_of(bits: Sequence[int], dim: int) -> CacheForm:
    """How the keys or the values of heads of `dim` channels are stored."""
    return CacheForm(tuple(bits), dim, GROUP)


def packed_at(tokens: int) -> int:
    """How many of `tokens` tokens before a query are packed: whole groups beyond the window."""
    return max(0, tokens - WINDOW) // GROUP * GROUP


def round_trip(numbers: Tensor, bits: int) -> Tensor:
    """What attention reads of keys or values [batch, heads, tokens, dim], whole groups, that were packed."""
    if not numbers.shape[2]:
        return numbers
    form = form_of((bits,) * numbers.shape[1], numbers.shape[3])
    return read_cache(pack_cache(numbers, form), form, head_table(form).to(numbers.device), numbers.dtype)


class _Side:
    """The packed tokens of the keys or of the values of a layer."""

    def __init__(self, form: CacheForm) -> None:
        self.form = form
        self.table = head_table(form)
        self.rows: CacheRows | None = None

    def append(self, numbers: Tensor) -> None:
        """Packs numbers [batch, heads, tokens, dim] and puts them behind the others."""
        new = pack_cache(numbers, self.form)
        if self.rows is not None:
            new = CacheRows(*(torch.cat(pair, 1) for pair in zip(self.rows, new, strict=True)))
        else:
            self.table = self.table.to(numbers.device)
        self.rows = new

    def read(self, dtype: torch.dtype, *, start: int = 0) -> Tensor:
        """The packed tokens from `start`, a multiple of the group, on: [batch, heads, tokens, dim]."""
        assert self.rows is not None
        rows = CacheRows(self.rows.codes[:, start:], self.rows.scales[:, start // GROUP :])
        return read_cache(rows, self.form, self.table, dtype)

    def keep(self, tokens: int) -> None:
        """Drops all but the first `tokens`, a multiple of the group."""
        assert self.rows is not None
        self.rows = CacheRows(self.rows.codes[:, :tokens], self.rows.scales[:, : tokens // GROUP]) if tokens else None

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Changes the batch of all tensors."""
        if self.rows is not None:
            self.rows = CacheRows(*map(change, self.rows))

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return 0 if self.rows is None else sum(tensor.nbytes for tensor in self.rows)


class PackedLayer(DynamicLayer):
    """One layer of a cache; `keys` and `values`, as transformers calls them, are the tokens in 16 bits."""

    def __init__(self, bits: LayerBits) -> None:
        super().__init__()
        self.bits = bits
        self._sides: tuple[_Side, _Side] | None = None
        self._packed = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends [batch, heads, tokens, dim] and returns all keys and values, packed ones as they are read."""
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            if len(self.bits.keys) != key_states.shape[1]:
                message = f"the cache has bits for {len(self.bits.keys)} KV heads, the layer has {key_states.shape[1]}"
                raise CheckpointError(message, hint="plan it again: circuitpress cache MODEL_DIR --budget 40%")
            self._sides = (
                _Side(form_of(self.bits.keys, key_states.shape[-1])),
                _Side(form_of(self.bits.values, value_states.shape[-1])),
            )
        assert self._sides is not None
        recent = _joined(self.keys, key_states), _joined(self.values, value_states)
        whole: Sequence[Tensor] = recent
        if self._packed:
            pairs = zip(self._sides, recent, strict=True)
            whole = [torch.cat([side.read(part.dtype), part], 2) for side, part in pairs]
        full = packed_at(recent[0].shape[2])
        if full:
            for side, part in zip(self._sides, recent, strict=True):
                side.append(part[:, :, :full])
            self._packed += full
        # Cloned: a view would keep what was packed in memory.
        self.keys, self.values = (part[:, :, full:].clone() if full else part for part in recent)
        return whole[0], whole[1]

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self._packed + super().get_seq_length()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last -`tokens_to_remove` tokens; packed ones of a group that is cut return to 16 bits."""
        left = self.get_seq_length() + tokens_to_remove
        if tokens_to_remove < 0 and left < self._packed:
            assert self._sides is not None
            whole = max(0, left) // GROUP * GROUP
            for name, side in zip(SIDES, self._sides, strict=True):
                recent = getattr(self, name)
                setattr(self, name, side.read(recent.dtype, start=whole)[:, :, : left - whole])
                side.keep(whole)
            self._packed = whole
        else:
            super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Empties the layer."""
        super().reset()
        self._sides, self._packed = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the batch, for beam search."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence of the batch."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some sequences of the batch."""
        self._map(lambda tensor: tensor[indices])

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = change(self.keys), change(self.values)
            for side in self._sides or ():
                side.map(change)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, packed and in 16 bits."""
        recent = sum(part.nbytes for part in (self.keys, self.values) if part is not None)
        return recent + sum(side.nbytes for side in self._sides or ())


def _joined(before: Tensor | None, new: Tensor) -> Tensor:
    return new if before is None or not before.numel() else torch.cat([before, new], 2)


def make_cache(model: nn.Module, bits: Sequence[LayerBits] | None = None) -> Cache:
    """An empty cache for `model`, a causal language model of transformers: bits of its config.json, or `bits`.

    CheckpointError if the config holds none, or they do not fit the model.
    """
    config: Any = model.config
    if bits is None:
        bits = read_bits(vars(config))
    cache = DynamicCache(config=config)
    if len(bits) != len(cache.layers):
        raise CheckpointError(
            f"the cache has bits for {len(bits)} layers, the model has {len(cache.layers)}",
            hint="plan it again: circuitpress cache MODEL_DIR --budget 40%",
        )
    cache.layers = [
        PackedLayer(own) if type(layer) is DynamicLayer else layer
        for layer, own in zip(cache.layers, bits, strict=True)
    ]
    return cache


def read_bits(config: Mapping[str, Any]) -> tuple[LayerBits, ...]:
    """The bits that a config.json holds; CheckpointError if it holds none, or damaged ones."""
    entry = config.get(KEY)
    if entry is None:
        raise CheckpointError(
            "config.json says nothing about the bits of a cache",
            hint="circuitpress cache MODEL_DIR --budget 40%, or pass `bits`",
        )
    try:
        if entry["version"] > VERSION:
            raise ValueError(f"version {entry['version']} is newer than {VERSION}")
        found = tuple(LayerBits(tuple(layer["keys"]), tuple(layer["values"])) for layer in entry["layers"])
        strangers = {bits for layer in found for side in layer for bits in side} - set(WIDTHS)
        if strangers or any(len(layer.keys) != len(layer.values) for layer in found):
            raise ValueError(f"bits are among {', '.join(map(str, WIDTHS))}, as many for values as for keys")
    except (KeyError, TypeError, ValueError) as error:
        message = f"{KEY} in config.json is damaged: {error}"
        raise CheckpointError(message, hint="circuitpress cache MODEL_DIR --budget 40%") from error
    return found


def bits_to_json(bits: Sequence[LayerBits]) -> dict[str, Any]:
    """What config.json holds under `KEY`."""
    layers = [{"keys": list(layer.keys), "values": list(layer.values)} for layer in bits]
    return {"version": VERSION, "layers": layers}


def uniform_bits(model: nn.Module, bits: int) -> tuple[LayerBits, ...]:
    """The same bits for all heads of a model."""
    config: Any = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return (LayerBits((bits,) * heads, (bits,) * heads),) * config.num_hidden_layers


def group_bytes(bits: int, dim: int) -> int:
    """Bytes of `GROUP` tokens of the keys, or the values, of one packed head."""
    return round(GROUP * bytes_with_scales(form_of((bits,), dim)))


def cache_bytes(bits: Sequence[LayerBits], dim: int, tokens: int) -> int:
    """Bytes of a cache of `tokens` tokens of one sequence, the last ones in 16 bits."""
    packed = packed_at(tokens)
    heads = [head for layer in bits for side in layer for head in side]
    return packed // GROUP * sum(group_bytes(head, dim) for head in heads) + (tokens - packed) * 2 * dim * len(heads)
