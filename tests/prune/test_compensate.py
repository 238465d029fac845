"""The compensation against float64 least squares on the activations themselves."""

import pytest
import torch

from circuitpress.prune import compensate

DAMPING = 1e-2


@pytest.mark.parametrize(("rows", "cols", "gone"), [(5, 9, [0, 4, 8]), (3, 7, [6]), (4, 6, [])])
@pytest.mark.parametrize("drift", [False, True])
def test_it_is_damped_least_squares(rows: int, cols: int, gone: list[int], drift: bool) -> None:
    generator = torch.Generator().manual_seed(cols)
    x = torch.randn(40, cols, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    y = x @ weight.T + (torch.randn(40, rows, generator=generator, dtype=torch.float64) if drift else 0)
    stay = torch.tensor([k for k in range(cols) if k not in gone])
    moment, missing = x.T @ x / 40, (y - x @ weight.T).T @ x / 40
    found = compensate(weight, moment, missing if drift else None, stay, damping=DAMPING)
    # The pull towards the old weights as further observations: sqrt(lambda) W' = sqrt(lambda) W_S.
    root = (40 * DAMPING * moment[stay][:, stay].diagonal().mean()).sqrt()
    inputs = torch.cat([x[:, stay], root * torch.eye(len(stay), dtype=torch.float64)])
    outputs = torch.cat([y, root * weight[:, stay].T])
    expected = torch.linalg.lstsq(inputs, outputs, driver="gelsd").solution.T
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_inputs_that_the_text_never_excites_keep_their_weights() -> None:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    stay = torch.tensor([1, 2, 4])
    assert torch.equal(compensate(weight, torch.zeros(5, 5), None, stay), weight[:, stay].double())
    moment = torch.diag(torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(compensate(weight, moment, None, stay), weight[:, stay].double())
