"""Outliers: exactly so many, those that pay, their values free, and super weights named."""

import pytest
import torch
from torch import Tensor

from circuitpress.formats import OutlierFormat, parse
from circuitpress.quantize import quantize_matrix
from circuitpress.quantize.outliers import SUPER, choose, round_with_outliers, surgeon_importance

from .test_feedback import correlated, loss, normal
from .test_polish import bounds_of, damped


def form_of(name: str) -> OutlierFormat:
    form = parse(name)
    assert isinstance(form, OutlierFormat)
    return form


def planted(rows: int, cols: int, count: int) -> tuple[Tensor, Tensor]:
    """Weights with `count` entries that are 15 times too large, and their mask."""
    weight = normal(rows, cols) * 0.02
    places = torch.randperm(rows * cols, generator=torch.Generator().manual_seed(9))[:count]
    mask = torch.zeros(rows * cols, dtype=torch.bool).index_fill(0, places, True).view(rows, cols)
    return torch.where(mask, weight.sign() * 0.3, weight), mask


def small(hessian: Tensor) -> Tensor:
    """Of the size that Hessians of losses have, so that no weight is a super weight."""
    return hessian * 1e-4


@pytest.mark.parametrize("name", ["int2g32+0.5%", "int3g64+0.5%", "int4g128+0.5%", "int3g32s6+0.5%"])
def test_planted_outliers_are_found(name: str) -> None:
    rows, cols = 60, 100
    form = form_of(name)
    weight, mask = planted(rows, cols, form.count(rows, cols))
    free, note = choose(weight, small(correlated(cols)), form, list(bounds_of(cols, form.base.group_size)))
    assert note == ""
    assert int(free.sum()) == form.count(rows, cols) == 30
    assert int((free & mask).sum()) >= 27  # one that nearly falls on the grid may be left to it


def test_the_price_decides_not_the_magnitude() -> None:
    """A large weight on a dead input is cheap to round; a smaller one on an excited input is not."""
    form = form_of("int3g20+0.2%")
    weight = normal(20, 20) * 0.02
    weight[4, 3], weight[9, 11] = 0.1, 0.09
    hessian = small(torch.eye(20))
    hessian[3, 3], hessian[11, 11] = 1e-9, 1e-2
    hessian[:, 3] = hessian[3] = 0
    # The grid of row 4 clips its large weight, that of row 9 has to stretch at the cost of the others.
    free, _ = choose(weight, hessian, form, [(0, 20)])
    assert form.count(20, 20) == 1
    assert free.nonzero().tolist() == [[9, 11]]


@pytest.mark.parametrize("polished", [False, True])
@pytest.mark.parametrize("name", ["int2g32+0.5%", "int3g64s6+0.25%"])
def test_outliers_pay_where_there_are_some(name: str, polished: bool) -> None:
    form = form_of(name)
    weight, _ = planted(60, 100, form.count(60, 100))
    hessian = small(correlated(100))
    value, _ = round_with_outliers(weight, hessian, form, polished=polished)
    base = quantize_matrix(weight, hessian, "rows", [(form.base.name, 0, 60)], polish=polished)
    with_outliers, without = loss(weight, form.decode(value), hessian), loss(weight, base.decode(), hessian)
    assert with_outliers < 0.6 * without
    again = form.unpack(form.pack(value), 60, 100)
    assert torch.equal(form.decode(again), form.decode(value))


def test_free_values_take_up_the_error_of_others() -> None:
    """Given everything else, no other number in place of an outlier lowers the damped error."""
    weight, _ = planted(40, 50, 10)
    hessian = small(correlated(50))
    form = form_of("int3g25+0.5%")
    value, _ = round_with_outliers(weight, hessian, form, polished=True)
    decoded = form.decode(value)
    gradient = (decoded - weight) @ damped(hessian)
    row, col = value.positions // 50, value.positions % 50
    step = gradient[row, col] / damped(hessian).diagonal()[col]
    typical = (decoded - weight).abs().mean()
    assert float(step.abs().max()) < 0.5 * float(typical)  # other columns moved once after they were set
    assert float((decoded - weight)[row, col].abs().max()) > 0  # so they are not the weights as they were


def test_super_weights_come_first_and_are_named() -> None:
    form = form_of("int4g16+0.1%")
    weight = normal(40, 48) * 0.02
    weight[7, 5] = 3.0
    hessian = torch.eye(48) * 1e-3
    hessian[5, 5] = 1.0
    assert SUPER < 0.5 * 9
    free, note = choose(weight, hessian, form, list(bounds_of(48, 16)))
    assert bool(free[7, 5])
    assert note.startswith("1 super weight kept in float16: [7, 5] (4")
    _, noted = round_with_outliers(weight, hessian, form, polished=False)
    assert noted == note


def test_surgeon_importance() -> None:
    hessian = correlated(17)
    inverse = torch.linalg.inv(damped(hessian).double())
    torch.testing.assert_close(surgeon_importance(hessian).double(), 1 / inverse.diagonal(), rtol=1e-4, atol=0)
    for broken in (torch.full((4, 4), torch.nan), -torch.eye(4)):
        assert torch.equal(surgeon_importance(broken), torch.ones(4))


def test_every_block_has_one() -> None:
    """Positions are stored as 16-bit distances: all outliers in the first rows would leave a gap too wide."""
    form = form_of("int4g128+0.01%")
    weight = normal(1100, 128) * 0.02
    weight[:2, ::4] = 0.5
    free, _ = choose(weight, small(torch.eye(128)), form, [(0, 128)])
    positions = free.flatten().nonzero()[:, 0]
    assert len(positions) == form.count(1100, 128)
    assert int(positions.diff(prepend=torch.tensor([-1])).max()) <= 1 << 16
    value, _ = round_with_outliers(weight, small(torch.eye(128)), form, polished=False)
    assert torch.equal(form.unpack(form.pack(value), 1100, 128).positions, positions)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 2), (17, 1)])
def test_small_segments(shape: tuple[int, int]) -> None:
    form = form_of("int2g64+0.5%")
    value, _ = round_with_outliers(normal(*shape), small(correlated(shape[1])), form, polished=True)
    assert len(value.positions) == 1
    assert bool(form.decode(value).isfinite().all())
