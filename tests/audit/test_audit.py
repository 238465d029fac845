"""Two models side by side, against transformers and numpy; a record of ordinary text and what it flags."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from circuitpress.audit import (
    drift,
    fit_monitor,
    load_monitor,
    lost_heads,
    save_monitor,
    surprise,
    survival,
)
from circuitpress.audit.monitor import shrunk_covariance
from circuitpress.errors import CircuitpressError
from circuitpress.mech.lens.attention import HeadScores
from circuitpress.mech.sae import Sae
from circuitpress.mech.sites import Site
from circuitpress.stream import open_stream

from ..whole import load, tokens


def shaken(folder: Path, out: Path, scale: float, *, only: str = "") -> Path:
    """A copy of a checkpoint with noise on its weights (of the tensors whose names hold `only`)."""
    shutil.copytree(folder, out)
    file = next(out.glob("*.safetensors"))
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, value in load_file(file).items():
        noise = torch.randn(value.shape, generator=generator) * value.float().std().nan_to_num() * scale
        tensors[name] = (value + noise.to(value.dtype)) if only in name and value.dim() == 2 else value
    save_file(tensors, file, metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_drift_is_what_transformers_says(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(name)
    other = shaken(folder, tmp_path / "other", 0.2)
    ids = tokens(3, 11)
    found = drift(open_stream(folder, batch_tokens=22), open_stream(other), ids)
    outputs = []
    for path in (folder, other):
        model = load(path, torch.float32)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            outputs.append(model(ids, output_attentions=True, output_hidden_states=True))
    first, second = outputs
    assert found.tokens == 33
    depth = len(found.layers) - 1
    for row in found.layers[:depth]:  # transformers puts the final norm on its last hidden state
        x, y = first.hidden_states[row.blocks], second.hidden_states[row.blocks]
        assert row.difference == pytest.approx(float(((x - y).norm(dim=-1) / x.norm(dim=-1)).mean()), rel=1e-4)
    p, q = first.logits.log_softmax(-1), second.logits.log_softmax(-1)
    assert found.layers[depth].lens_kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    agreement = float((first.logits.argmax(-1) == second.logits.argmax(-1)).float().mean())
    assert found.layers[depth].lens_agreement == pytest.approx(agreement, abs=1e-6)
    for head in found.heads:
        a, b = first.attentions[head.layer][:, head.head], second.attentions[head.layer][:, head.head]
        assert head.distance == pytest.approx(float(0.5 * (a - b).abs().sum(-1).mean()), abs=1e-5)
    assert len(found.heads) == sum(a.shape[1] for a in first.attentions)


def test_a_model_does_not_drift_from_itself(tiny_llama: Path) -> None:
    found = drift(open_stream(tiny_llama), open_stream(tiny_llama), tokens(2, 9))
    assert all(row.difference == 0 and abs(row.lens_kl) < 1e-6 and row.lens_agreement == 1 for row in found.layers)
    assert all(head.distance == 0 for head in found.heads)


def test_only_changed_heads_move(tiny_llama: Path, tmp_path: Path) -> None:
    """With new queries in layer 1 alone, patterns of earlier layers stand."""
    other = shaken(tiny_llama, tmp_path / "other", 1.0, only="layers.1.self_attn.q_proj")
    found = drift(open_stream(tiny_llama), open_stream(other), tokens(2, 9))
    moved = {head.layer for head in found.heads if head.distance > 1e-6}
    assert 1 in moved
    assert 0 not in moved
    assert [row.blocks for row in found.layers if row.difference > 0][0] == 2


def test_models_of_other_shapes_are_refused(tiny_llama: Path, tiny_gpt2: Path) -> None:
    with pytest.raises(CircuitpressError, match="layers cannot be compared one by one: "):
        drift(open_stream(tiny_llama), open_stream(tiny_gpt2), tokens(2, 9))


def test_heads_that_lost_their_pattern() -> None:
    def scores(head: int = 1, **changes: float) -> HeadScores:
        plain = {"previous_token": 0.1, "induction": 0.1, "duplicate": 0.0, "first_position": 0.2}
        return HeadScores(0, head, **(plain | changes))

    before = [scores(head=0, induction=0.9), scores(previous_token=0.5), scores(head=2, first_position=0.39)]
    after = [scores(head=0, induction=0.44), scores(previous_token=0.26), scores(head=2, first_position=0.0)]
    found = lost_heads(before, after)
    assert [(c.head, c.pattern, c.lost) for c in found] == [(0, "induction", True), (1, "previous_token", False)]
    with pytest.raises(ValueError, match="other heads"):
        lost_heads(before, after[:2])


def sae_of(d: int, n: int, site: Site) -> Sae:
    generator = torch.Generator().manual_seed(4)
    w = torch.randn(d, n, generator=generator)
    return Sae(w, torch.randn(n, generator=generator), w.T.contiguous(), torch.zeros(d), "standard", site=site)


def test_features_survive_by_correlation(tiny_llama: Path, tmp_path: Path) -> None:
    """Against numpy's correlation of the features of states that transformers gives."""
    other = shaken(tiny_llama, tmp_path / "other", 0.3)
    ids, site = tokens(6, 13), Site(0, "resid_post")
    streams = open_stream(tiny_llama, batch_tokens=26), open_stream(other)
    sae = sae_of(streams[0].anatomy.hidden, 19, site)
    found = survival(*streams, sae, ids)
    acts = []
    for path in (tiny_llama, other):
        with torch.no_grad():
            hidden = load(path, torch.float32)(ids, output_hidden_states=True).hidden_states[1]
        acts.append((hidden.flatten(0, 1).double() @ sae.w_enc.double() + sae.b_enc.double()).relu().numpy())
    assert found.tokens == 78
    for f in range(19):
        fires = (acts[0][:, f] > 0).sum()
        assert found.rates[0, f] == pytest.approx(fires / 78)
        if fires < 10:
            assert np.isnan(found.correlation[f])
        else:
            assert found.correlation[f] == pytest.approx(np.corrcoef(acts[0][:, f], acts[1][:, f])[0, 1], abs=1e-4)
    assert found.told > 5
    assert found.survivors == pytest.approx(np.nanmean((found.correlation >= 0.9)[np.isfinite(found.correlation)]))
    assert found.correlation[found.worst(1)[0]] == np.nanmin(found.correlation)
    same = survival(streams[0], streams[0], sae, ids)
    assert same.survivors == 1.0
    with pytest.raises(CircuitpressError, match="does not say where it reads"):
        survival(*streams, sae_of(streams[0].anatomy.hidden, 3, None), ids)  # pyright: ignore


def test_the_covariance_is_shrunk_by_the_right_share() -> None:
    """Ledoit and Wolf's share, by their definition with a loop."""
    x = torch.randn(37, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ torch.diag(
        torch.tensor([1.0, 2.0, 3.0, 0.1, 0.5], dtype=torch.float64)
    )
    x = x - x.mean(0)
    sample = x.T @ x / 37
    target = torch.eye(5, dtype=torch.float64) * sample.trace() / 5
    error = sum(float((torch.outer(row, row) - sample).square().sum()) for row in x) / 37**2
    share = min(1.0, error / float((sample - target).square().sum()))
    assert 0 < share < 1
    torch.testing.assert_close(shrunk_covariance(x), (1 - share) * sample + share * target)


def runs_of_one_token(n: int, length: int) -> Tensor:
    return torch.arange(n)[:, None].expand(n, length).contiguous() % 97


def test_a_monitor_flags_what_is_unlike_its_text(tiny_llama: Path, tmp_path: Path) -> None:
    stream, site = open_stream(tiny_llama), Site(1, "resid_post")
    sae = sae_of(stream.anatomy.hidden, 29, site)
    monitor = fit_monitor(stream, tokens(160, 12), site, sae=sae, quantile=0.9)
    # 40 windows: the binomial spread about a tenth, of the threshold's 40 windows as well.
    assert all(abs(rate - 0.1) < 4 * 2**0.5 * monitor.stderr for rate in monitor.false_positives.values())
    save_monitor(monitor, tmp_path / "record.safetensors")
    again = load_monitor(tmp_path / "record.safetensors")
    assert (again.thresholds, again.site, again.windows) == (monitor.thresholds, site, 160)
    ordinary = surprise(stream, tokens(40, 12, seed=9), again, sae=sae)
    other = open_stream(shaken(tiny_llama, tmp_path / "other", 0.7))
    strange = {
        "distance": surprise(other, tokens(40, 12, seed=9), again)["distance"],  # another model on ordinary text
        "features": surprise(stream, runs_of_one_token(40, 12), again, sae=sae)["features"],  # text of one token
    }
    for name, threshold in again.thresholds.items():
        assert (ordinary[name] > threshold).mean() < 0.35
        assert (strange[name] > threshold).mean() > 0.9
    assert np.median(ordinary["distance"]) == pytest.approx(1, rel=0.2)


def test_a_monitor_needs_enough_text_and_its_own_model(tiny_llama: Path, tmp_path: Path) -> None:
    stream, site = open_stream(tiny_llama), Site(0, "neurons")
    with pytest.raises(CircuitpressError, match="15 windows are too few"):
        fit_monitor(stream, tokens(15, 8), site)
    monitor = fit_monitor(stream, tokens(16, 8), site)
    with pytest.raises(CircuitpressError, match="the monitor knows"):
        surprise(stream, tokens(4, 8), replace(monitor, mean=monitor.mean[:-1]))
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(CircuitpressError, match="is not a monitor"):
        load_monitor(tmp_path / "x.safetensors")
