"""Training: on a real model down to a stated FVU, on planted features found again, resumed to the same bits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from circuitpress.data import load_windows
from circuitpress.errors import CircuitpressError, RecipeError
from circuitpress.mech.sae import train as training
from circuitpress.mech.sae.loss import Recipe, Weights, evaluate
from circuitpress.mech.sae.rows import Rows, gather, shuffled
from circuitpress.mech.sae.train import Training, train
from circuitpress.mech.sites import Site
from circuitpress.store import Store
from circuitpress.stream import open_stream

DEMO = Path(__file__).parents[3] / "recipes" / "demo"


def rows_of(x: Tensor, pieces: int = 3) -> Rows:
    """Rows [n, d] as if they came from a model."""
    store, site = Store(None), Site(0, "resid_post")
    parts = x.tensor_split(pieces)
    for b, part in enumerate(parts):
        store.put((str(site), b), part[None])
    return Rows(store, site, tuple(len(part) for part in parts), 0, x.mean(0), float(x.norm(dim=1).mean()))


def planted(n: int, *, features: int = 24, d: int = 16, used: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sums of `used` random unit directions [features, d] with positive coefficients around a mean: rows [n, d]."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(features, d, generator=g), dim=1)
    code = torch.zeros(n, features)
    which = torch.stack([torch.randperm(features, generator=g)[:used] for _ in range(n)])
    code.scatter_(1, which, 0.5 + torch.rand(n, used, generator=g))
    return code @ directions + 2 * torch.randn(d, generator=g), directions


def unexplained(sae: object, x: Tensor) -> float:
    return float((sae.reconstruct(x) - x).square().sum() / (x - x.mean(0)).square().sum())  # pyright: ignore


@pytest.mark.parametrize(("architecture", "l0"), [("topk", 16.0), ("batchtopk", 16.0), ("jumprelu", 16.0)])
def test_on_a_real_model_in_seconds(architecture: Recipe, l0: float) -> None:
    """8 thousand tokens of the demo checkpoint, judged on others: FVU below 0.4 where the mean alone has 1."""
    import transformers

    stream = open_stream(DEMO / "checkpoint")
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO / "checkpoint")
    ids = load_windows(DEMO / "calibration.txt", tokenizer, length=128, samples=80, seed=0).ids
    site = Site(1, "resid_post")
    rows = gather(stream, ids[:64], site)
    assert rows.total == 64 * 127
    sae = train(rows, Training(512, 16, architecture=architecture, steps=120, batch=256))
    other = gather(stream, ids[64:], site)
    x = torch.cat([other.piece(b) for b in range(len(other.counts))])
    a, _ = sae.encode(x)
    assert unexplained(sae, x) < 0.4
    assert l0 / 2 < float((a > 0).sum(1).double().mean()) < l0 * 1.25
    torch.testing.assert_close(sae.w_dec.norm(dim=1), torch.ones(512))
    assert sae.architecture == ("topk" if architecture == "topk" else "jumprelu")
    assert (sae.site, sae.skip) == (site, 1)


def test_planted_features_are_found_again() -> None:
    x, directions = planted(6500)
    sae = train(rows_of(x[500:]), Training(32, 3, steps=1500, batch=256, seed=1))
    assert unexplained(sae, x[:500]) < 0.1
    cosine = (directions @ sae.w_dec.T).max(1).values
    assert float((cosine > 0.95).double().mean()) > 0.85


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu"])
def test_an_interrupted_run_ends_with_the_same_bits(
    architecture: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, settings = rows_of(planted(700)[0]), Training(20, 3, architecture=architecture, steps=40, batch=64)
    whole = train(rows, settings)
    monkeypatch.setattr(training, "_EVERY", 0.0)
    seen = []

    def interrupt(_: float, note: str) -> None:
        seen.append(note)
        if len(seen) == 23:
            raise KeyboardInterrupt

    state = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(rows, settings, state=state, advance=interrupt)
    assert state.exists()
    notes = []
    resumed = train(rows, settings, state=state, advance=lambda _, note: notes.append(note))
    assert len(notes) == 18  # the state was written after step 22
    for name in ("w_enc", "b_enc", "w_dec", "b_dec"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name))
    assert not state.exists()


def test_a_state_of_other_settings_or_a_damaged_one_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, settings, state = rows_of(planted(300)[0]), Training(20, 3, steps=9, batch=64), tmp_path / "state.safetensors"
    monkeypatch.setattr(training, "_EVERY", 0.0)

    def stop(_: float, note: str) -> None:
        if "step 5" in note:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(rows, settings, state=state, advance=stop)
    with pytest.raises(RecipeError, match="k was 3, is now 2"):
        train(rows, replace(settings, k=2), state=state)
    with pytest.raises(RecipeError, match="mean was"):
        train(rows_of(planted(300, seed=4)[0]), settings, state=state)
    state.write_bytes(state.read_bytes()[:50])
    with pytest.raises(CircuitpressError, match="is damaged"):
        train(rows, settings, state=state)


def test_batches_are_each_row_once_and_go_on_where_they_stopped() -> None:
    x = torch.arange(105.0)[:, None].repeat(1, 2)
    rows = rows_of(x, pieces=5)
    stream = shuffled(rows, 10, seed=3)
    first = [next(stream)[:, 0] for _ in range(25)]
    assert len(torch.cat(first[:10]).unique()) == 100
    assert not torch.equal(first[0], first[10])  # another epoch has another order
    for start in (0, 7, 10, 23):
        assert torch.equal(next(shuffled(rows, 10, seed=3, start=start))[:, 0], first[start])
    assert not torch.equal(next(shuffled(rows, 10, seed=4))[:, 0], first[0])
    with pytest.raises(CircuitpressError, match="less than one batch"):
        next(shuffled(rows, 106, seed=0))


def test_the_first_positions_are_left_out(tiny_llama: Path) -> None:
    stream, ids = open_stream(tiny_llama, batch_tokens=16), torch.arange(40).view(5, 8)
    rows = gather(stream, ids, Site(1, "neurons"), skip=3)
    whole = gather(stream, ids, Site(1, "neurons"), skip=0)
    x = torch.cat([whole.piece(b) for b in range(len(whole.counts))]).view(5, 8, -1)
    found = torch.cat([rows.piece(b) for b in range(len(rows.counts))])
    assert torch.equal(found, x[:, 3:].flatten(0, 1))
    torch.testing.assert_close(rows.mean, found.mean(0))
    assert rows.norm == pytest.approx(float(found.norm(dim=1).mean()), rel=1e-5)
    with pytest.raises(CircuitpressError, match="none left after 8"):
        gather(stream, ids, Site(1, "neurons"), skip=8)


def test_aux_loss_gives_dead_latents_a_gradient() -> None:
    """A latent that never fires has none from TopK; AuxK turns it towards the error of the others."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(50, 6, generator=g)
    weights = Weights(torch.randn(6, 9, generator=g), torch.zeros(9), torch.randn(9, 6, generator=g), torch.zeros(6))
    weights.b_enc[4] = -100.0
    weights.w_enc.requires_grad_(True)
    weights.w_dec.requires_grad_(True)
    dead = torch.zeros(9, dtype=torch.bool)
    plain = evaluate("topk", weights, z, 2, dead)
    assert not plain.fired[4]
    assert not torch.autograd.grad(plain.loss, weights.w_dec)[0][4].any()
    dead[4] = True
    weights.b_enc[4] = 0.0
    weights.w_enc.data[:, 4] *= 1e-3  # alive, but never among the two largest
    step = evaluate("topk", weights, z, 2, dead)
    assert torch.autograd.grad(step.loss, weights.w_dec)[0][4].abs().sum() > 0
    assert step.fvu == pytest.approx(float(evaluate("topk", weights, z, 2, ~dead & dead).fvu))


def test_jump_relu_gradient_for_its_threshold() -> None:
    """The rectangle estimator by hand, for one latent and one row within the bandwidth."""
    weights = Weights(torch.ones(1, 1), torch.zeros(1), torch.ones(1, 1), torch.zeros(1), torch.tensor([0.5]).log())
    assert weights.log_threshold is not None
    weights.log_threshold.requires_grad_(True)
    z = torch.tensor([[0.55], [2.0], [-1.0]])
    step = evaluate("jumprelu", weights, z, 1, torch.zeros(1, dtype=torch.bool), sparsity=2.0, bandwidth=0.4)
    assert (step.l0, step.least) == (pytest.approx(2 / 3), pytest.approx(0.55))
    variance = float((z - z.mean()).square().sum())
    assert step.fvu == pytest.approx(1.0 / variance)  # only the third row is not reconstructed
    # d loss / d a of the first row is 0 (it is exact); the penalty is 2 (L0 - 1)^2 with L0 = 2/3.
    to_count = 2 * 2 * (2 / 3 - 1) / 3
    expected = -(1 / 0.4) * to_count * 0.5  # the last factor: d threshold / d log threshold
    (found,) = torch.autograd.grad(step.loss, weights.log_threshold)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_settings_name_all_that_cannot_be() -> None:
    with pytest.raises(RecipeError) as caught:
        Training(4, 8, steps=0, batch=-1)
    assert [problem.split()[0] for problem in caught.value.problems] == ["steps", "batch", "k"]
    assert json.dumps(vars(Training(8, 4)))  # it is kept beside the state
