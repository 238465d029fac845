"""Cutting matrices: every weight in exactly one segment, by whole matrices, by units and around protected ones."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitpress.anatomy import Anatomy, Matrix, read_anatomy
from circuitpress.formats import parse
from circuitpress.segments import groups_of, name_units, split_protected, unit_weights
from circuitpress.units import Group, Prices, UnitId

FORMATS = ("int2g16", "int4g64", "float32")


def coverage(groups: tuple[Group, ...], anatomy: Anatomy) -> dict[str, np.ndarray]:
    """How often each weight of each matrix lies in a segment."""
    count = {m.module: np.zeros((m.rows, m.cols), dtype=int) for block in anatomy.blocks for m in block.matrices}
    for group in groups:
        for s in group.segments:
            span = slice(s.start, s.stop)
            index = (span, slice(None)) if s.axis == "rows" else (slice(None), span)
            count[s.module][index] += 1
            assert count[s.module][index].shape == (s.rows, s.cols)
            assert s.numel == s.rows * s.cols
    return count


def make_prices(anatomy: Anatomy) -> Prices:
    groups = tuple(group for block in anatomy.blocks for group in groups_of(block, "matrix"))
    rows = np.arange(1.0, len(groups) + 1)[:, None]
    nats = rows * np.array([[9.0, 3.0, 0.0]])
    nbytes = [[sum(parse(f).nbytes(s.rows, s.cols) for s in g.segments) for f in FORMATS] for g in groups]
    return Prices(groups, FORMATS, np.array(nbytes), nats, 2 * nats, nats / 10)


@pytest.mark.parametrize("granularity", ["matrix", "unit"])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen2", "tiny_gpt2"])
@pytest.mark.parametrize("neuron_block", [1, 16, 52, 1000])
def test_groups_tile_every_matrix(
    name: str, granularity: str, neuron_block: int, request: pytest.FixtureRequest
) -> None:
    anatomy = read_anatomy(request.getfixturevalue(name))
    groups = tuple(g for b in anatomy.blocks for g in groups_of(b, granularity, neuron_block=neuron_block))  # pyright: ignore
    assert all((count == 1).all() for count in coverage(groups, anatomy).values())
    assert len({group.name for group in groups}) == len(groups)
    for group in groups:
        assert all(unit.layer == group.layer for unit in group.units)


def test_units_own_their_rows_and_columns(tiny_llama: Path) -> None:
    """Query heads 2 and 3 read KV group 1: rows 16 to 31 of q and columns 16 to 31 of o, rows 8 to 15 of k and v."""
    block = read_anatomy(tiny_llama).blocks[1]
    found = {}
    for group in groups_of(block, "unit", neuron_block=16):
        (segment,) = group.segments
        for unit in group.units:
            found[segment.module.rsplit(".", 1)[1], str(unit)] = (segment.axis, segment.start, segment.stop)
    assert found["q_proj", "L1.kv_group.1"] == ("rows", 16, 32)
    assert found["o_proj", "L1.kv_group.1"] == ("cols", 16, 32)
    assert found["k_proj", "L1.kv_group.1"] == found["v_proj", "L1.kv_group.1"] == ("rows", 8, 16)


def test_runs_of_o_are_not_narrower_than_a_block_of_neurons(tiny_llama: Path) -> None:
    block = read_anatomy(tiny_llama).blocks[0]
    spans = [
        (group.segments[0].start, group.segments[0].stop, [unit.index for unit in group.units])
        for group in groups_of(block, "unit", neuron_block=20)
        if "o_proj" in group.name
    ]
    assert spans == [(0, 32, [0, 1]), (32, 48, [2])]


def test_heads_of_gpt2_own_three_runs(tiny_gpt2: Path) -> None:
    block = read_anatomy(tiny_gpt2).blocks[0]
    mine = [
        (group.segments[0].start, group.segments[0].stop)
        for group in groups_of(block, "unit")
        if "c_attn" in group.name and UnitId(0, "head", 3) in group.units
    ]
    assert mine == [(24, 32), (64, 72), (104, 112)]


def expected_cells(anatomy: Anatomy, unit: UnitId, matrix: Matrix, neuron_position: int) -> list[tuple[str, int]]:
    """The rows or columns of a matrix that belong to a unit, index by index, from the definition of attention."""
    block = anatomy.blocks[unit.layer]
    share, size = block.heads // block.kv_heads, block.head_dim
    cells: list[tuple[str, int]] = []
    if unit.kind == "neuron":
        axis = {"gate": "rows", "up": "rows", "down": "cols"}.get(matrix.role)
        return [(axis, neuron_position)] if axis else []
    heads = [h for h in range(block.heads) if (h if unit.kind == "head" else h // share) == unit.index]
    for h in heads:
        for d in range(size):
            if matrix.role == "q":
                cells.append(("rows", h * size + d))
            if matrix.role in ("k", "v"):
                cells.append(("rows", h // share * size + d))
            if matrix.role == "o":
                cells.append(("cols", h * size + d))
            if matrix.role == "qkv":
                cells += [("rows", part * block.heads * size + h * size + d) for part in range(3)]
    return cells


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_protected_units_are_cut_out(name: str, data: st.DataObject) -> None:
    anatomy = ANATOMIES[name]
    prices = make_prices(anatomy)
    units = data.draw(st.lists(st.sampled_from(anatomy.units()), min_size=1, max_size=8, unique=True))
    split = split_protected(prices, units, anatomy)
    assert all((count == 1).all() for count in coverage(split.groups, anatomy).values())
    protected = coverage(tuple(g for g in split.groups if g.name.endswith(":protected")), anatomy)
    for block in anatomy.blocks:
        mine = [unit for unit in units if unit.layer == block.index]
        neurons = sorted(unit.index for unit in mine if unit.kind == "neuron")
        if neurons:
            order = split.neuron_order[block.index].tolist()
            assert order[: len(neurons)] == neurons
            assert sorted(order) == list(range(block.neurons))
        else:
            assert block.index not in split.neuron_order
        for matrix in block.matrices:
            expected = np.zeros((matrix.rows, matrix.cols), dtype=int)
            for unit in mine:
                position = neurons.index(unit.index) if unit.kind == "neuron" else -1
                for axis, i in expected_cells(anatomy, unit, matrix, position):
                    expected[(i, slice(None)) if axis == "rows" else (slice(None), i)] = 1
            np.testing.assert_array_equal(protected[matrix.module], expected)
    check_totals(prices, split)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_the_weights_of_units(name: str, data: st.DataObject) -> None:
    """The cells that protection would cut out, neurons where they are."""
    anatomy = ANATOMIES[name]
    block = data.draw(st.sampled_from(anatomy.blocks))
    units = data.draw(st.lists(st.sampled_from(block.units()), max_size=8, unique=True))
    found = unit_weights(block, units)
    for matrix in block.matrices:
        cells = {cell for unit in units for cell in expected_cells(anatomy, unit, matrix, unit.index)}
        axis, indices = found.get(matrix.role, ("rows", ()))
        assert {(axis, i) for i in indices} == cells
        assert list(indices) == sorted(set(indices))


def check_totals(prices: Prices, split: Prices) -> None:
    """Prices are shared out and nothing is lost; bytes are those of the parts, which round up each for itself."""
    for name in ("nats", "nats_sequence", "stderr"):
        np.testing.assert_allclose(getattr(split, name).sum(0), getattr(prices, name).sum(0), rtol=1e-12)
    assert split.numel.sum() == prices.numel.sum()
    for i, group in enumerate(split.groups):
        for f, form in enumerate(FORMATS):
            assert split.nbytes[i, f] == sum(parse(form).nbytes(s.rows, s.cols) for s in group.segments)
    assert (split.nbytes[:, 2].sum(), split.formats) == (prices.nbytes[:, 2].sum(), prices.formats)


@pytest.fixture(scope="module", autouse=True)
def _anatomies(tiny_llama: Path, tiny_gpt2: Path) -> None:
    ANATOMIES.update({"tiny_llama": read_anatomy(tiny_llama), "tiny_gpt2": read_anatomy(tiny_gpt2)})


ANATOMIES: dict[str, Anatomy] = {}


def test_a_whole_layer_of_units(tiny_llama: Path) -> None:
    """Nothing is left over: there is no empty group."""
    anatomy = read_anatomy(tiny_llama)
    units = [unit for unit in anatomy.blocks[0].units() if unit.kind != "head"]
    split = split_protected(make_prices(anatomy), units, anatomy)
    first = [group for group in split.groups if group.layer == 0]
    assert len(first) == 7
    assert all(group.name.endswith(":protected") and group.numel for group in first)


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        (UnitId(3, "head", 0), "layer 3 does not exist: the model has layers 0 to 2"),
        (UnitId(0, "head", 6), "L0.head.6 does not exist: layer 0 has 6 of kind head"),
        (UnitId(0, "kv_group", 3), "L0.kv_group.3 does not exist: layer 0 has 3"),
        (UnitId(0, "neuron", 52), "L0.neuron.52 does not exist: layer 0 has 52"),
        (UnitId(0, "expert", 0), "L0.expert.0 cannot be protected"),
    ],
)
def test_units_that_do_not_exist(tiny_llama: Path, unit: UnitId, message: str) -> None:
    anatomy = read_anatomy(tiny_llama)
    with pytest.raises(ValueError, match=message):
        split_protected(make_prices(anatomy), [unit], anatomy)


def test_prices_by_unit_cannot_be_split(tiny_llama: Path) -> None:
    """Their neurons have an order already, and their groups are no whole matrices."""
    anatomy = read_anatomy(tiny_llama)
    groups = groups_of(anatomy.blocks[0], "unit")
    table = np.ones((len(groups), 3))
    prices = Prices(groups, FORMATS, table.astype(np.int64), table, table, table, {0: np.arange(52)})
    with pytest.raises(ValueError, match="whole"):
        split_protected(prices, [UnitId(0, "neuron", 3)], anatomy)


def test_whole_matrices_say_which_units_they_hold(tiny_llama: Path) -> None:
    anatomy = read_anatomy(tiny_llama)
    groups = tuple(group for block in anatomy.blocks for group in groups_of(block, "matrix"))
    table = np.ones((len(groups), 1))
    prices = Prices(groups, ("int4g64",), table.astype(np.int64), table, table, table)
    head, neuron = UnitId(1, "head", 3), UnitId(2, "neuron", 7)
    named = name_units(prices, [head, neuron], anatomy)
    holds = {group.name: group.units for group in named.groups if group.units}
    attention = {f"model.layers.1.self_attn.{role}_proj": (head,) for role in "qkvo"}
    assert holds == attention | {f"model.layers.2.mlp.{role}_proj": (neuron,) for role in ("gate", "up", "down")}
    assert [group.segments for group in named.groups] == [group.segments for group in groups]
    for unit in (UnitId(9, "head", 0), UnitId(0, "head", 6), UnitId(0, "layer", 0)):
        with pytest.raises(ValueError):
            name_units(prices, [unit], anatomy)
