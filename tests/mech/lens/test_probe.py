"""Probes: the optimum of logistic regression, what can be decoded and what cannot, a control that catches memory."""

from pathlib import Path

import numpy as np
import pytest
import torch

from circuitpress.data import load_windows
from circuitpress.errors import CircuitpressError
from circuitpress.mech.lens.probe import fit_logistic, previous_is_common, probe, probe_stream
from circuitpress.stream import open_stream

from ...whole import tokens

DEMO = Path(__file__).parents[3] / "recipes" / "demo"


def test_the_fit_is_the_optimum() -> None:
    """The same objective minimised by torch in float64, from another start."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5)) * [1, 3, 0.1, 1, 2] + 4
    labels = (x[:, 0] + 0.3 * x[:, 1] + rng.normal(size=200) > 5).astype(np.int64) + (x[:, 4] > 6)
    model = fit_logistic(x, labels, classes=3, l2=0.02)
    z = torch.from_numpy((x - x.mean(0)) / x.std(0))
    weight = torch.full((5, 3), 0.1, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(z @ weight + bias, torch.from_numpy(labels))
        loss = loss + 0.01 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(model.weight, weight.detach().numpy(), atol=2e-3)
    expected = (z @ weight + bias).argmax(1).numpy()
    assert (model.predict(x) == expected).mean() > 0.99


def test_what_is_linear_is_found_and_what_is_not_there_is_not() -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (30, 20), generator=g).numpy()
    control = torch.randint(2, (30, 20), generator=g).numpy()
    noise = torch.randn(30, 20, 12, generator=g)
    present = noise.clone()
    present[..., 3] += 6 * torch.from_numpy(labels)
    found, missing = probe({"present": present, "missing": noise}, labels, control)
    assert found.accuracy > 0.98
    assert abs(found.control - 0.5) < 0.15 > abs(missing.accuracy - 0.5)
    assert found.selectivity == found.accuracy - found.control
    assert found.tokens == 9 * 20


def test_memory_of_tokens_is_caught_by_the_control() -> None:
    """Activations that are one-hot in the token decode any labelling by token: high accuracy, no selectivity."""
    ids = tokens(40, 16, vocab=13)
    x = torch.nn.functional.one_hot(ids, 13).float()
    labels, control = (np.isin(ids.numpy(), chosen).astype(np.int64) for chosen in ([1, 2, 3, 4], [0, 5, 9, 12]))
    (row,) = probe({"memory": x}, labels, control)
    assert row.accuracy == row.control == 1
    assert row.selectivity == 0


def test_labels_of_the_built_in_task() -> None:
    ids = torch.tensor([[5, 5, 5, 2, 1], [5, 3, 5, 2, 4]])
    labels, control = previous_is_common(ids)
    assert labels.tolist() == [[-1, 1, 1, 1, 0], [-1, 1, 0, 1, 0]]
    pairs = [
        (int(t), int(c)) for row, own in zip(ids, control, strict=True) for t, c in zip(row, own[1:], strict=False)
    ]
    assert len(set(pairs)) == len({token for token, _ in pairs})  # the class is one of the token type's


def test_attention_brings_the_previous_token() -> None:
    """On real text nothing of the neighbour but what words go together is in the embedding; after two blocks it is."""
    import transformers

    folder = DEMO / "checkpoint"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = load_windows(DEMO / "calibration.txt", tokenizer, length=64, samples=48, seed=0).ids
    rows = probe_stream(open_stream(folder), ids)
    assert [row.place for row in rows] == [*(f"L{i}.resid_pre" for i in range(6)), "L5.resid_post"]
    assert max(row.accuracy for row in rows[1:]) > rows[0].accuracy + 0.05
    assert max(row.selectivity for row in rows[1:]) > rows[0].selectivity


def test_too_few_windows(tiny_llama: Path) -> None:
    with pytest.raises(CircuitpressError, match="1 windows cannot be split"):
        probe_stream(open_stream(tiny_llama), tokens(1, 8))
