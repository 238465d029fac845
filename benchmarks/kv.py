"""What a key-value cache of few bits costs: KL, bytes and time beside 16 bits, uniform bits, controls and quanto.

1. Text is decoded with a cache, in steps of as many tokens as find the same older ones packed, so that every token sees
   what it would if tokens came one by one; KL is to the same model with nothing packed.
2. `planned` spends the bytes of a uniform cache by prices from other text. Its controls have the same bytes or fewer:
   the same bits for all heads, some for keys and some for values (`control:sides`), and the planned bits given to heads
   at random (`control:shuffled`).
3. `single` packs one side of one head to 3 bits and compares what is measured with its price.
4. `step` rows time one layer of the shape of Llama-3-8B: what one decoded token costs beside attention itself.

Length is `--length`, and `context` of a row what the checkpoint knows: a model that is given more guesses, and its KL
says little. `lab/lengthen.py` fine-tunes one to 8192 tokens; rows of such say from how many (`lengthened_from`).

    python benchmarks/kv.py --checkpoint DIR --calibration FILE --text FILE [--length 2048] [--windows 4]
    python benchmarks/kv.py --steps
"""

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, QuantizedCache
from transformers.cache_utils import DynamicLayer
from transformers.utils.import_utils import is_optimum_quanto_available

from circuitpress.data import load_windows
from circuitpress.evaluate.divergence import Tally
from circuitpress.plan.cache import plan_cache
from circuitpress.run.caching import layer_bits
from circuitpress.runtime.cache import GROUP, WINDOW, LayerBits, PackedLayer, cache_bytes, make_cache, uniform_bits
from circuitpress.score.cache import OFFERED, price_cache
from circuitpress.stream import open_stream
from circuitpress.units import Prices
from common import load_rows, save_results

PRICED = 512
"""Tokens of the windows that heads are priced on, at most."""


@click.command(context_settings={"show_default": True})
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("--calibration", type=click.Path(path_type=Path, exists=True), help="Text that heads are priced on.")
@click.option("--text", type=click.Path(path_type=Path, exists=True), help="Text that is decoded.")
@click.option("--length", default=512)
@click.option("--windows", default=8)
@click.option("--steps", is_flag=True, help="Time one layer instead.")
@click.option("--out", default=Path(__file__).with_name("results") / "kv.json", type=click.Path(path_type=Path))
def main(
    checkpoint: Path | None, calibration: Path | None, text: Path | None, length: int, windows: int, steps: bool,
    out: Path,
) -> None:  # fmt: skip
    """Measures caches of one checkpoint at one length, or with --steps the time of one layer."""
    torch.set_num_threads(1)
    before = load_rows(out)
    if steps:
        rows = list(_steps())
        before = [row for row in before if row["method"] != "step"]
    elif checkpoint and calibration and text:
        rows = list(_rows(checkpoint, calibration, text, length, windows))
        before = [row for row in before if (row.get("checkpoint"), row["tokens"]) != (checkpoint.name, length)]
    else:
        raise click.UsageError("--checkpoint, --calibration and --text, or --steps")
    save_results(out, before + rows)
    for row in rows:
        click.echo(row)


def _rows(checkpoint: Path, calibration: Path, text: Path, length: int, windows: int) -> Iterator[dict[str, Any]]:
    stream, tokenizer = open_stream(checkpoint, dtype="float32"), AutoTokenizer.from_pretrained(checkpoint)
    known = min(PRICED, stream.anatomy.context or PRICED)
    prices = price_cache(stream, load_windows(calibration, tokenizer, length=known, samples=32, seed=0).ids)
    del stream
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = load_windows(text, tokenizer, length=length, samples=windows, seed=0).ids
    dim = model.config.head_dim
    with torch.no_grad():
        exact = [model(window[None]).logits[0].float() for window in ids]
    about = {"checkpoint": checkpoint.name, "context": model.config.max_position_embeddings, "tokens": length}
    about |= lengthened(checkpoint)

    def measured(method: str, bits: Sequence[LayerBits] | None) -> dict[str, Any]:
        """One row; None for quanto."""
        tally = Tally()
        for window, reference in zip(ids, exact, strict=True):
            if bits is None:
                cache = QuantizedCache("quanto", model.config, nbits=4, q_group_size=64, residual_length=128)
            else:
                cache = make_cache(model, bits)
            tally.add(reference, decoded(model, window, cache), None)
        found = tally.result(1)
        row = about | {"method": method, "kl": found.kl, "kl_stderr": found.kl_stderr}
        row["top1_agreement"] = found.top1_agreement
        if bits is not None:
            heads = sum(len(side) for layer in bits for side in layer)
            group = cache_bytes(bits, dim, WINDOW + 2 * GROUP) - cache_bytes(bits, dim, WINDOW + GROUP)
            row |= {
                "bytes": cache_bytes(bits, dim, length), "bytes_at_2k": cache_bytes(bits, dim, 2048),
                "bytes_at_8k": cache_bytes(bits, dim, 8192), "predicted_kl": predicted(prices, bits),
                "bits_per_number": 8 * group / (GROUP * dim * heads),
            }  # fmt: skip
        return row

    yield measured("16 bits", uniform_bits(model, 16))
    for width in (8, 6, 4, 3):
        share = int(prices.nbytes[:, OFFERED.index(width)].sum()) / int(prices.nbytes[:, -1].sum())
        budget = f"{100 * share + 1e-9:.12f}%"
        planned = layer_bits(prices, plan_cache(prices, budget, tokens=GROUP).choice.tolist())
        yield measured(f"uniform {width}", uniform_bits(model, width))
        yield measured(f"planned, bytes of {width}", planned)
        if width in (4, 3):
            yield measured(f"control:sides, bytes of {width}", sides(prices, planned, width))
            yield measured(f"control:shuffled, bytes of {width}", shuffled(planned))
    if is_optimum_quanto_available():
        yield measured("transformers quanto 4, groups of 64", None)
    if length <= PRICED:
        yield about | {"method": "single"} | singles(model, prices, ids, exact)


def lengthened(checkpoint: Path) -> dict[str, int]:
    """From how many tokens `lab/lengthen.py` fine-tuned a checkpoint, where it did."""
    record = checkpoint / "lengthened.json"
    return {"lengthened_from": json.loads(record.read_text())["from"]} if record.exists() else {}


@torch.no_grad()
def decoded(model: Any, window: Tensor, cache: Any) -> Tensor:
    """Logits [length, vocab] of a window that is decoded with `cache`, in steps that end where tokens are packed."""
    first, found = 0, []
    while first < len(window):
        last = WINDOW if first == 0 else first + GROUP
        found.append(model(window[None, first:last], past_key_values=cache).logits[0].float())
        first = last
    return torch.cat(found)


def predicted(prices: Prices, bits: Sequence[LayerBits]) -> float:
    """The sum of prices."""
    flat = [head for layer in bits for side in layer for head in side]
    return float(sum(prices.nats[row, prices.column(f"cache{head}")] for row, head in enumerate(flat)))


def sides(prices: Prices, planned: Sequence[LayerBits], width: int) -> list[LayerBits]:
    """The best number of bits for all keys and for all values that has no more bytes than `width` for both."""
    heads, found = len(planned[0].keys), {}
    for keys, values in product((*OFFERED, 16), repeat=2):
        if keys + values <= 2 * width:
            bits = [LayerBits((keys,) * heads, (values,) * heads)] * len(planned)
            found[predicted(prices, bits)] = bits
    return found[min(found)]


def shuffled(planned: Sequence[LayerBits]) -> list[LayerBits]:
    """The planned bits of keys among all keys, those of values among all values."""
    draw = np.random.default_rng(0)
    table = np.array([[layer.keys, layer.values] for layer in planned]).transpose(1, 0, 2)
    mixed = [draw.permutation(side.reshape(-1)).reshape(side.shape).tolist() for side in table]
    return [LayerBits(tuple(keys), tuple(values)) for keys, values in zip(*mixed, strict=True)]


def singles(model: Any, prices: Prices, ids: Tensor, exact: Sequence[Tensor]) -> dict[str, Any]:
    """Rank correlation and ratio of measured KL and price when one side of one head has 3 bits."""
    column, measured = prices.column("cache3"), []
    for row in range(len(prices.groups)):
        table = np.full(len(prices.groups), len(prices.formats) - 1)
        table[row] = column
        tally = Tally()
        for window, reference in zip(ids, exact, strict=True):
            tally.add(reference, decoded(model, window, make_cache(model, layer_bits(prices, table.tolist()))), None)
        measured.append(tally.result(1).kl)
    found: dict[str, Any] = {"bits": 3, "heads": len(measured)}
    for name, table in (("token", prices.nats), ("sequence", prices.nats_sequence)):
        ratio = np.array(measured) / table[:, column]
        rank: Any = spearmanr(measured, table[:, column])
        found |= {f"spearman_{name}": float(rank.statistic), f"median_ratio_{name}": float(np.median(ratio))}
    return found


def _steps() -> Iterator[dict[str, Any]]:
    """Time of one more token in the cache of a layer, 8 KV heads of 128 in bfloat16, and bytes of 32 such layers."""
    heads, dim = 8, 128
    for tokens in (2048, 8192):
        for name, bits in (("16 bits", None), ("uniform 8", 8), ("uniform 4", 4), ("4 and 8", 0)):
            widths = ((4, 8) * (heads // 2)) if bits == 0 else (bits or 16,) * heads
            layer: Any = DynamicLayer() if bits is None else PackedLayer(LayerBits(widths, widths))
            keys, values = torch.randn(2, 1, heads, tokens, dim, generator=torch.Generator().manual_seed(0)).bfloat16()
            layer.update(keys, values)
            one = keys[:, :, :1]
            times = []
            for _ in range(12):
                started = time.perf_counter()
                layer.update(one, one)
                times.append(time.perf_counter() - started)
            size = 32 * cache_bytes([LayerBits(widths, widths)], dim, tokens)
            yield {
                "method": "step", "cache": name, "tokens": tokens, "milliseconds": 1e3 * statistics.median(times[2:]),
                "bytes_of_32_layers": size,
            }  # fmt: skip


if __name__ == "__main__":
    main()
