"""The table of times: every case is there, modules compute what they hold, and the file keeps what it knew."""

import json
from pathlib import Path

import pytest
import torch

from circuitpress.anatomy import read_anatomy
from circuitpress.bench.latency import measure, random_module, save_table, shapes_of
from circuitpress.plan import LatencyTable
from circuitpress.runtime.linear import PackedLinear

FORMATS = ("int2g32", "int4g64", "int8g64", "int3g64s6+0.5%", "code3g64", "trellis2", "bfloat16")


def test_every_shape_format_and_batch_has_a_time() -> None:
    seen: list[str] = []
    rows = measure([(24, 64), (7, 64)], FORMATS, [1, 3], rotated=1, advance=lambda _, note: seen.append(note))
    cases = {(row["format"], row["rows"], row["cols"], row["batch"]) for row in rows}
    assert cases >= {(name, 24, 64, batch) for name in FORMATS for batch in (1, 3)}
    assert len(cases) == len(rows) and all(row["microseconds"] > 0 for row in rows)
    assert len(seen) == 2 * len(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_the_timed_module_multiplies_with_what_it_holds(name: str) -> None:
    module = random_module(name, 24, 64, device="cpu", dtype=torch.bfloat16)
    assert module is not None
    module.requires_grad_(False)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight = module.dequantize() if isinstance(module, PackedLinear) else module.get_parameter("weight").float()
    expected = x.double() @ weight.double().T
    assert torch.allclose(module(x).double(), expected, atol=0.03 * float(expected.abs().max()))


def test_shapes_of_a_model(tiny_llama: Path) -> None:
    anatomy = read_anatomy(tiny_llama)
    shapes = shapes_of(anatomy)
    assert len(set(shapes)) == len(shapes)
    assert set(shapes) == {(m.rows, m.cols) for block in anatomy.blocks for m in block.matrices}


def test_a_table_keeps_other_cases_of_the_same_machine(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    row = {"format": "int4g64", "rows": 8, "cols": 64, "batch": 1, "microseconds": 5.0}
    save_table([row], path, device="cpu", dtype=torch.bfloat16)
    save_table([row | {"batch": 4}, row | {"microseconds": 6.0}], path, device="cpu", dtype=torch.bfloat16)
    assert LatencyTable.load(path).times == {("int4g64", 8, 64, 4): 5.0, ("int4g64", 8, 64, 1): 6.0}
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"machine": "another"}))
    save_table([row], path, device="cpu", dtype=torch.bfloat16)
    assert LatencyTable.load(path).times == {("int4g64", 8, 64, 1): 5.0}, "times of another machine are not kept"
