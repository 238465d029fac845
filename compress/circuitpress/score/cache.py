"""What fewer bits of a KV head's keys or values in the cache cost, in nats: one walk up and down, all heads at once.

    price  =  1/2 E_t [ (g_t . dA_t)^2 ]

A_t is what attention hands to `o` at position t, g_t the gradient of the sum of token losses there, and dA_t the change
that comes of packed keys, or packed values, of one KV head in the query heads that read it.

1. `watch` sees the queries, keys and values of a block, after the rotation, as transformers' attention gets them.
2. A query at position t finds the last tokens in 16 bits and older ones packed, as a model does that decodes one token
   after another (runtime/cache.py). Queries that find the same tokens packed go together through transformers' own
   attention, so masks, scales and sinks are the model's. A head that looks near loses nothing: its tokens are exact.
3. Heads do not mix before `o`, so all are packed at once, to one width after another, and each gets its own price.

Prices of keys and values of a head, and of heads, are added up; benchmarks/kv.py measures how far that is true.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..anatomy import Block
from ..console import Advance, ignore
from ..hooks import weight_of
from ..runtime.cache import GROUP, SIDES, WINDOW, group_bytes, packed_at, round_trip
from ..stream import Stream, backward, forward
from ..units import Group, Prices, Segment
from .fisher import output_gradients, pull

OFFERED = (2, 3, 4, 5, 6, 8)
"""Bits that are priced beside 16, which cost nothing."""


@dataclass
class Call:
    """A call of attention: query [batch, heads, tokens, dim], key and value [batch, KV heads, tokens, dim]."""

    function: Callable[..., tuple[Tensor, Any]]
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]


@contextlib.contextmanager
def watch() -> Iterator[list[Call]]:
    """Collects the calls of transformers' attention in this context."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

    original, calls = functions["sdpa"], []

    def watching(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
        calls.append(Call(original, module, q.detach(), k.detach(), v.detach(), mask, options))
        return original(module, q, k, v, mask, **options)

    functions["sdpa"] = watching
    try:
        yield calls
    finally:
        functions["sdpa"] = original


def price_cache(stream: Stream, windows: Tensor, *, seed: int = 0, advance: Advance = ignore) -> Prices:
    """Prices of `OFFERED` and 16 bits for the keys and the values of every KV head, from `windows` [n, length] of text.

    Groups are named `L3.keys.1`; bytes are those of 64 tokens. Windows of no more tokens than stay in 16 bits price
    everything at zero. `advance` is called twice for each block.
    """
    batches = stream.batches(windows)
    found: dict[int, NDArray[np.float64]] = {}
    hidden, gradients = stream.store("hidden"), stream.store("gradients")
    try:
        forward(stream, batches, hidden, keep=True, advance=advance)
        output_gradients(stream, batches, hidden, gradients, draws=1, seed=seed)

        def visit(index: int, module: nn.Module, inputs: Callable[[int], Tensor]) -> None:
            place, prices = stream.anatomy.blocks[index], []
            for b in range(len(batches)):
                pulled, price = _prices(stream, module, place, inputs(b), gradients.get((b, 0), stream.device))
                gradients.put((b, 0), pulled)
                prices.append(price)
            found[index] = torch.cat(prices, 3).cpu().double().numpy()
            advance(1, f"block {index}")

        backward(stream, hidden, len(batches), visit)
    finally:
        hidden.clear()
        gradients.clear()
    return _table(stream, found)


def _prices(stream: Stream, module: nn.Module, place: Block, hidden: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient at the block's input; prices float32 [token or sequence, sides, widths, windows, KV heads]."""
    with watch() as calls:
        pulled, flows = pull(stream, module, place, hidden, gradient)
    call, o = calls[0], place.role("o")
    clean = flows[o.module].x.view(*hidden.shape[:2], place.heads, -1)
    g = (flows[o.module].g @ weight_of(module, place, o)).view(clean.shape).float()
    prices = []
    for side in range(len(SIDES)):
        for bits in OFFERED:
            effect = ((attend_packed(call, side, bits) - clean).float() * g).sum(-1)
            effect = effect.unflatten(2, (place.kv_heads, -1)).sum(-1)
            prices.append(torch.stack([effect.square().mean(1), effect.sum(1).square() / effect.shape[1]]) / 2)
    return pulled, torch.stack(prices, 1).unflatten(1, (len(SIDES), len(OFFERED)))


@torch.no_grad()
def attend_packed(call: Call, side: int, bits: int) -> Tensor:
    """What attention returns [batch, tokens, heads, dim] when keys (side 0) or values (1) are cached in `bits` bits."""
    exact = (call.key, call.value)
    tokens = call.query.shape[2]
    rounded = round_trip(exact[side][:, :, : packed_at(tokens - 1)], bits)
    parts, first = [], 0
    while first < tokens:
        packed = packed_at(first)
        last = min(tokens, packed + WINDOW + GROUP)
        seen = [part[:, :, :last] for part in exact]
        seen[side] = torch.cat([rounded[:, :, :packed], exact[side][:, :, packed:last]], 2)
        if call.mask is None:
            there = torch.arange(last, device=call.query.device)
            mask = (there <= there[first:, None])[None, None]
        else:
            mask = call.mask[:, :, first:last, :last]
        parts.append(call.function(call.module, call.query[:, :, first:last], *seen, mask, **call.options)[0])
        first = last
    return torch.cat(parts, 1)


def _table(stream: Stream, found: Mapping[int, NDArray[np.float64]]) -> Prices:
    """The table of all heads; `found[layer]` is what `_prices` returns."""
    groups, nbytes, rows = [], [], []
    for index, place in enumerate(stream.anatomy.blocks):
        n = found[index].shape[3]
        token, sequence = found[index].mean(3)
        stderr = found[index][0].std(2, ddof=1) / np.sqrt(n) if n > 1 else np.full_like(token, np.inf)
        for side, name in enumerate(SIDES):
            for head in range(place.kv_heads):
                start, stop = head * place.head_dim, (head + 1) * place.head_dim
                segment = Segment(f"{place.prefix}.{name}", "rows", start, stop, place.head_dim, 1)
                groups.append(Group(f"L{index}.{name}.{head}", index, (segment,)))
                nbytes.append([group_bytes(bits, place.head_dim) for bits in (*OFFERED, 16)])
                rows.append([[*table[side, :, head], 0.0] for table in (token, sequence, stderr)])
    formats = tuple(f"cache{bits}" for bits in (*OFFERED, 16))
    return Prices(tuple(groups), formats, np.array(nbytes), *np.array(rows).transpose(1, 0, 2))
