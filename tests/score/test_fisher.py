"""Fisher gradients, labels and unit effects against autograd through the whole model in float64."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, nn

from circuitpress.score.fisher import Flow, add_second_moment, output_gradients, pull, saliency, unit_effects
from circuitpress.stream import Stream, backward, forward, open_stream

from ..whole import MODELS, blocks_of, draw_labels, linears, load, tokens, trace, weight

# The engine computes in float32, the reference in float64 but for what transformers does in float32 (rotary tables,
# norms): a relative error of 1e-6 in each of some tens of operations, with a margin.
CLOSE = 2e-5

Seen = dict[int, tuple[Tensor, dict[str, Flow], dict[str, Tensor]]]


def walk_down(stream: Stream, ids: Tensor, *, draws: int = 1, seed: int = 0) -> Iterator[tuple[int, int, Seen]]:
    """For every (micro-batch, draw): by block its pulled gradient, flows and unit effects."""
    batches = stream.batches(ids)
    hidden, gradients = stream.store("h"), stream.store("g")
    forward(stream, batches, hidden, keep=True)
    keys = output_gradients(stream, batches, hidden, gradients, draws=draws, seed=seed)
    assert keys == [(b, draw) for b in range(len(batches)) for draw in range(draws)]
    seen: dict[tuple[int, int], Seen] = {key: {} for key in keys}

    def visit(index: int, module: nn.Module, inputs: Callable[[int], Tensor]) -> None:
        place = stream.anatomy.blocks[index]
        for b, draw in keys:
            pulled, flows = pull(stream, module, place, inputs(b), gradients.get((b, draw)))
            gradients.put((b, draw), pulled)
            seen[b, draw][index] = (pulled, flows, unit_effects(module, place, flows))

    backward(stream, hidden, 1 + max(b for b, _ in keys), visit)
    for (b, draw), blocks in seen.items():
        yield b, draw, blocks


def relative(value: Tensor, expected: Tensor) -> float:
    """The largest error as a share of the largest expected value."""
    assert value.shape == expected.shape
    return float((value.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_whole_model(name: str, request: pytest.FixtureRequest) -> None:
    """At every block's input and at every matrix's output, for two draws and micro-batches of two and one."""
    folder = request.getfixturevalue(name)
    model, ids = load(folder), tokens(3, 7)
    with torch.no_grad():
        logits = model(ids).logits
    wholes = [trace(model, ids, draw_labels(logits, seed=5, draw=draw)) for draw in range(2)]
    assert not torch.equal(wholes[0].pulled[0], wholes[1].pulled[0])
    stream = open_stream(folder, batch_tokens=14)
    count = 0
    for b, draw, blocks in walk_down(stream, ids, draws=2, seed=5):
        rows, whole = slice(2 * b, 2 * b + 2), wholes[draw]
        for index, (pulled, flows, _) in blocks.items():
            assert relative(pulled, whole.pulled[index][rows]) < CLOSE
            for module, flow in flows.items():
                assert relative(flow.x, whole.x[module][rows].flatten(0, 1)) < CLOSE, module
                assert relative(flow.g, whole.g[module][rows].flatten(0, 1)) < CLOSE, module
                count += 1
    assert count == 2 * 2 * len(linears(model))


def closing_effects(model: nn.Module, site: nn.Module, spans: list[slice], ids: Tensor, labels: Tensor) -> Tensor:
    """g_t . dY_t [tokens, spans] of closing columns of a map's input, by autograd on gates that multiply them.

    Closing moves a gate from 1 to 0, so the effect is the derivative of the loss times -1.
    """
    result = []
    for span in spans:
        gate = torch.ones(*ids.shape, 1, dtype=torch.float64, requires_grad=True)

        def before(_: nn.Module, args: tuple[Tensor, ...], gate: Tensor = gate, span: slice = span) -> tuple[Tensor]:
            mine = torch.zeros_like(args[0])
            mine[..., span] = 1
            return (args[0] * (1 + (gate - 1) * mine),)

        handle = site.register_forward_pre_hook(before)
        loss = nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten(), reduction="sum")
        result.append(-torch.autograd.grad(loss, gate)[0].flatten())
        handle.remove()
    return torch.stack(result, 1)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_unit_effects_are_derivatives_of_gates(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    model, ids = load(folder), tokens(2, 6)
    labels = draw_labels(model(ids).logits.detach())
    stream = open_stream(folder)
    for _, _, blocks in walk_down(stream, ids):
        place, effects = stream.anatomy.blocks[1], blocks[1][2]
        size, share = place.head_dim, place.heads // place.kv_heads
        heads = [slice(h * size, (h + 1) * size) for h in range(place.heads)]
        groups = [slice(k * size * share, (k + 1) * size * share) for k in range(place.kv_heads)]
        neurons = [slice(n, n + 1) for n in range(0, place.neurons, 7)]
        for kind, role, spans in (("head", "o", heads), ("kv_group", "o", groups), ("neuron", "down", neurons)):
            site = linears(model)[place.role(role).module]
            expected = closing_effects(model, site, spans, ids, labels)
            effect = effects[kind][:, ::7] if kind == "neuron" else effects[kind]
            assert relative(effect, expected) < CLOSE, kind


def test_labels_follow_the_softmax(tiny_llama: Path) -> None:
    """Chi-square of 3000 draws. A label is read off its gradient: the nearest of those that the 97 labels would
    give."""
    stream, ids = open_stream(tiny_llama), tokens(1, 2)
    hidden, gradients = stream.store("h"), stream.store("g")
    forward(stream, [ids], hidden, keep=True)
    draws = 3000
    output_gradients(stream, [ids], hidden, gradients, draws=draws, seed=1)
    model = load(tiny_llama)
    states = hidden.get((3, 0)).double()
    for t in range(2):
        state = states[0, t].clone().requires_grad_(True)
        logits = model.lm_head(model.model.norm(state))
        rows = [torch.autograd.grad(-logits.log_softmax(-1)[v], state, retain_graph=True)[0] for v in range(97)]
        found = torch.stack([gradients.get((0, draw))[0, t] for draw in range(draws)]).double()
        distance = torch.cdist(found, torch.stack(rows), compute_mode="donot_use_mm_for_euclid_dist")
        assert float(distance.amin(1).max()) < 1e-3 < 0.05 < float(distance.topk(2, largest=False).values[:, 1].min())
        counts = torch.bincount(distance.argmin(1), minlength=97).double()
        expected = draws * logits.detach().softmax(-1)
        often = expected >= 5
        seen, wanted = (torch.cat([x[often], x[~often].sum()[None]]).numpy() for x in (counts, expected))
        assert chisquare(seen, wanted).pvalue > 0.01
        # The test has power: a slightly flatter softmax would not pass.
        flat = (logits.detach() / 1.2).softmax(-1)
        flat = torch.cat([flat[often], flat[~often].sum()[None]]).numpy()
        assert chisquare(seen, flat * draws).pvalue < 1e-3


def test_labels_do_not_depend_on_micro_batches(tiny_llama: Path) -> None:
    ids = tokens(5, 6)
    found = []
    for batch_tokens in (6, 12, 18, 30):
        stream = open_stream(tiny_llama, batch_tokens=batch_tokens)
        inputs = [blocks[0][0] for _, _, blocks in walk_down(stream, ids, seed=3)]
        found.append(torch.cat(inputs))
    for other in found[1:]:
        # One differing label would change a gradient by its own size.
        assert relative(other, found[0]) < CLOSE


def test_labels_depend_on_seed_draw_and_sequence(tiny_llama: Path) -> None:
    stream, ids = open_stream(tiny_llama), tokens(1, 6).expand(3, -1).contiguous()
    seen = {}
    for seed in (0, 1):
        for _, draw, blocks in walk_down(stream, ids, draws=2, seed=seed):
            for row in range(3):  # the same text three times: only its place tells the rows apart
                seen[seed, draw, row] = blocks[0][0][row]
    values = list(seen.values())
    assert len(values) == 12
    assert all(relative(a, b) > 0.01 for i, a in enumerate(values) for b in values[:i])


def test_logits_in_pieces_give_the_same_gradient(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, ids = open_stream(tiny_llama), tokens(2, 7)
    hidden = stream.store("h")
    forward(stream, [ids], hidden, keep=True)
    found = []
    for chunk in (1 << 22, 3 * 97):
        monkeypatch.setattr("circuitpress.score.fisher.LOGIT_CHUNK", chunk)
        gradients = stream.store("g")
        output_gradients(stream, [ids], hidden, gradients, draws=1, seed=0)
        found.append(gradients.get((0, 0)))
    assert relative(found[1], found[0]) < CLOSE


def test_saliency_and_second_moment() -> None:
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(11, 5, generator=generator), torch.randn(11, 3, generator=generator)
    s = saliency(Flow(x, g))
    expected = torch.tensor([sum(float(v) ** 2 for v in row) / 3 for row in g])
    torch.testing.assert_close(s, expected)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2.0**-7)):  # bfloat16: two roundings of a factor
        total = torch.full((5, 5), 2.0)
        add_second_moment(total, x.to(dtype), s)
        brute = sum(float(s[t]) * torch.outer(x[t], x[t]).double() for t in range(11)) + 2.0
        assert isinstance(brute, Tensor)
        assert relative(total, brute) < tolerance


def test_every_block_has_a_flow_for_every_matrix(tiny_gpt2: Path) -> None:
    stream = open_stream(tiny_gpt2)
    model = load(tiny_gpt2)
    for _, _, blocks in walk_down(stream, tokens(1, 4)):
        assert len(blocks) == len(blocks_of(model))
        names = {name for _, flows, _ in blocks.values() for name in flows}
        assert names == set(linears(model))
        shapes = {name: flow.g.shape[1] for _, flows, _ in blocks.values() for name, flow in flows.items()}
        assert shapes == {name: weight(module).shape[0] for name, module in linears(model).items()}
