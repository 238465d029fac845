"""The command `cache`: prices, a plan within bytes of a token, and the bits in the model's config.json."""

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import Console
from ..errors import CheckpointError
from ..files import write_bytes_atomic
from .session import choose_device, load_tokenizer

if TYPE_CHECKING:
    import circuitpress.runtime.cache
    import circuitpress.units

Result = tuple[str, dict[str, Any]]


def cache_model(
    model: Path, budget: str, console: Console, *, text: Path | None = None, windows: int = 16, length: int = 1024,
    device: str | None = None,
) -> Result:  # fmt: skip
    """Plans the cache of the model folder `model` and writes its bits into config.json."""
    from ..data import load_windows
    from ..plan.cache import plan_cache
    from ..runtime.cache import GROUP, KEY, SIDES, WINDOW, bits_to_json
    from ..score.cache import price_cache
    from ..stream import open_stream

    stream = open_stream(model, device=choose_device(device or "auto"))
    anatomy = stream.anatomy
    length = min(length, anatomy.context or length)
    if length <= WINDOW + GROUP:
        raise CheckpointError(
            f"windows of {length} tokens price nothing: {WINDOW + GROUP} tokens stay in 16 bits",
            hint="ask for longer windows with --length, where the model's context allows them",
        )
    chosen = load_windows(text, load_tokenizer(model), length=length, samples=windows, seed=0, vocab=anatomy.vocab)
    with console.progress("cache", 2 * stream.depth) as advance:
        prices = price_cache(stream, chosen.ids, advance=advance)
    solution = plan_cache(prices, budget, tokens=GROUP)
    bits = layer_bits(prices, solution.choice.tolist())
    path = model / "config.json"
    config = json.loads(path.read_text()) | {KEY: bits_to_json(bits)}
    write_bytes_atomic(path, (json.dumps(config, indent=2) + "\n").encode())

    whole = int(prices.nbytes[:, -1].sum())
    counts = {side: dict(sorted(Counter(b for own in bits for b in getattr(own, side)).items())) for side in SIDES}
    document = {
        "model": str(model), "budget": budget, "bytes_of_a_token": solution.nbytes / GROUP,
        "bytes_of_a_token_in_16_bits": whole / GROUP, "predicted_kl": solution.nats,
        "tokens_in_16_bits": [WINDOW, WINDOW + GROUP - 1], "text": chosen.describe(), **counts,
        "layers": bits_to_json(bits)["layers"],
    }  # fmt: skip
    lines = [
        f"{model}: {solution.nbytes / GROUP:,.0f} bytes of cache a token, {solution.nbytes / whole:.1%} of 16 bits",
        f"predicted KL {solution.nats:.2e} nats a token on texts of {length} tokens",
        *(f"{side}: " + ", ".join(f"{n} x {b} bits" for b, n in counts[side].items()) for side in counts),
        "next: model.generate(..., past_key_values=circuitpress.runtime.cache.make_cache(model))",
    ]
    return "\n".join(lines), document


def layer_bits(
    prices: "circuitpress.units.Prices", choice: list[int]
) -> "tuple[circuitpress.runtime.cache.LayerBits, ...]":
    """The bits of a plan, layer by layer; `choice` has the column of each group of `prices`."""
    from ..runtime.cache import LayerBits

    found: dict[int, dict[str, list[int]]] = {}
    for group, column in zip(prices.groups, choice, strict=True):
        side = group.name.split(".")[1]
        found.setdefault(group.layer, {}).setdefault(side, []).append(int(prices.formats[column].removeprefix("cache")))
    return tuple(LayerBits(tuple(sides["keys"]), tuple(sides["values"])) for _, sides in sorted(found.items()))
