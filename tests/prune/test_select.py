"""The greedy order against brute force: every removal refitted from scratch in float64."""

import pytest
import torch
from torch import Tensor

from circuitpress.prune.select import inverse, removal_order

DAMPING = 1e-3


def problem(rows: int, cols: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """W [rows, cols], H and G, with inputs of which some nearly repeat others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5 * cols, cols, generator=generator, dtype=torch.float64)
    x[:, 1::3] = x[:, ::3][:, : x[:, 1::3].shape[1]] + 0.1 * x[:, 1::3]
    g = torch.randn(4 * rows, rows, generator=generator, dtype=torch.float64) * torch.linspace(0.2, 2, rows)
    return torch.randn(rows, cols, generator=generator, dtype=torch.float64), x.T @ x / len(x), g.T @ g / len(g)


def cost(weight: Tensor, moment: Tensor, metric: Tensor, left: list[int]) -> float:
    """1/2 tr(G E H E^T) of the best that the columns outside `left` can do, for the damped H."""
    h = moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    stay = [k for k in range(len(h)) if k not in left]
    error = -weight.clone()
    error[:, stay] += weight @ h[:, stay] @ torch.linalg.inv(h[stay][:, stay])
    return 0.5 * float((metric @ error @ h @ error.T).trace())


@pytest.mark.parametrize(("rows", "units", "width"), [(7, 13, 1), (5, 4, 3), (6, 1, 5), (9, 150, 1)])
def test_each_step_removes_the_cheapest_unit_given_the_ones_before(rows: int, units: int, width: int) -> None:
    weight, moment, metric = problem(rows, units * width)
    count = units if units < 100 else 90  # beyond the columns that are collected before updates are applied
    order, costs = removal_order(moment, weight.T @ metric @ weight, width=width, count=count, damping=DAMPING)
    left: list[int] = []
    for step, unit in enumerate(order.tolist()):
        if units < 100 or step in (0, 1, 63, 64, 65, 89):
            options = {
                u: cost(weight, moment, metric, left + list(range(u * width, (u + 1) * width)))
                for u in range(units)
                if u * width not in left
            }
            assert options[unit] == pytest.approx(min(options.values()), rel=1e-6)
            assert float(costs[step]) == pytest.approx(options[unit], rel=1e-6)
        left += range(unit * width, (unit + 1) * width)
    assert len(set(order.tolist())) == count


def test_of_two_neurons_that_say_the_same_one_is_free_and_the_other_is_not() -> None:
    weight, moment, metric = problem(6, 8, seed=3)
    twin = torch.eye(8, dtype=torch.float64)
    twin[5] = twin[2]  # input 5 repeats input 2
    moment = twin @ moment @ twin.T
    weight *= torch.tensor([9, 9, 1, 9, 9, 1, 9, 9], dtype=torch.float64)
    order, costs = removal_order(moment, weight.T @ metric @ weight, count=2, damping=1e-9)
    assert set(order.tolist()[:1]) <= {2, 5}
    assert float(costs[0]) < 1e-6 < float(costs[1])


def test_units_that_must_stay_do_and_too_many_are_refused() -> None:
    weight, moment, metric = problem(4, 6)
    keep = torch.tensor([True, False, True, False, False, False])
    order = removal_order(moment, weight.T @ metric @ weight, count=4, keep=keep).order
    assert set(order.tolist()) == {1, 3, 4, 5}
    with pytest.raises(ValueError, match="5 of 6 units cannot leave: 2 of them must stay"):
        removal_order(moment, weight.T @ metric @ weight, count=5, keep=keep)


def test_a_moment_without_rank_is_damped_until_it_can_be_inverted() -> None:
    for moment in (torch.zeros(3, 3), torch.ones(4, 4), -torch.eye(3)):
        assert bool(inverse(moment, DAMPING).isfinite().all())
