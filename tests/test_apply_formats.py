"""Codebooks, outliers and short scales from prices to a folder that transformers loads."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from circuitpress.apply import apply
from circuitpress.formats import parse
from circuitpress.price import price
from circuitpress.runtime.linear import packed_linears
from circuitpress.segments import Granularity
from circuitpress.stream import open_stream

from .test_apply import contents, dense_twin, plan_of, write
from .whole import load, tokens

FORMATS = ("int3g16s6", "code2", "code2g16", "code3r8g16", "int2g16+0.5%", "int3g16s6+0.1%", "float32")


@pytest.mark.parametrize(
    ("name", "granularity"), [("tiny_llama", "matrix"), ("tiny_llama", "unit"), ("tiny_gpt2", "matrix")]
)
def test_transformers_computes_with_what_was_rounded(
    name: str, granularity: Granularity, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, ids = request.getfixturevalue(name), tokens(4, 8)
    stream = open_stream(folder)
    prices = price(stream, ids, formats=FORMATS, granularity=granularity, neuron_block=20, folder=tmp_path / "priced")[
        1
    ]
    assert bool((prices.nats[:, :-1] > 0).all())
    cycle = itertools.cycle(range(len(FORMATS)))
    choices = [next(cycle) for _ in prices.groups]
    plan = plan_of(prices, lambda i: choices[i])
    model = write(folder, plan, ids, tmp_path)
    assert open_stream(model).anatomy.linear_bytes == plan.linear_bytes
    loaded = load(model, torch.float32)
    assert {part.format.name for module in packed_linears(loaded).values() for part in module.descriptor.parts} >= set(
        FORMATS[:-1]
    )
    text = tokens(3, 9, seed=1)
    with torch.no_grad():
        expected, found = (each(text).logits for each in (dense_twin(folder, model), loaded))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        half = load(model, torch.bfloat16)(text).logits.float()
    assert float((half - expected).abs().mean()) < 0.05 * float(expected.abs().mean())


def test_polish_is_an_option_and_changes_the_shards(tiny_llama: Path, tmp_path: Path) -> None:
    ids, stream = tokens(4, 8), open_stream(tiny_llama)
    prices = price(stream, ids, formats=("int2g16", "code2g16"), folder=tmp_path / "priced")[1]
    plan = plan_of(prices, lambda i: i % 2)
    written = []
    for polish in (True, False):
        apply(
            stream, plan, ids, saliency=tmp_path / "priced", shards=tmp_path / "shards", out=tmp_path / "model",
            polish=polish,
        )  # fmt: skip
        written.append(contents(tmp_path / "model"))
    different = [name for name in written[0] if written[0][name] != written[1][name]]
    assert len(different) == stream.depth
    assert all(name.endswith(".safetensors") for name in different)
    with safe_open(tmp_path / "model" / different[0], framework="pt") as file:
        keys = set(file.keys())
    assert {key.rpartition(".")[2] for key in keys} >= {
        "weight",
        "scales",
        "zeros",
        "books",
        "small_scales",
        "exponents",
    }
    assert parse("code2g16").nbytes(8, 16) == 32 + 8 + 6 + 1
