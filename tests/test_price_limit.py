"""What a price means: the second-order term of the KL that a change really costs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from circuitpress import price as pricing
from circuitpress.price import price
from circuitpress.score.fisher import pull
from circuitpress.stream import Stream, backward, forward, open_stream

from .recorder import Recorder
from .whole import divergence, linears, load, tokens, weight

# float32 in the engine: products of some hundred terms each good to 1e-6, squared.
CLOSE = 1e-4


# --------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def small(request: pytest.FixtureRequest, build_checkpoint: Callable[..., Path]) -> Path:
    """A vocabulary of 13, so that all labels can be tried."""
    from transformers import GPT2Config, LlamaConfig

    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "dtype": "float32"}
    llama = LlamaConfig(
        vocab_size=13, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=16, initializer_range=0.2, **ends,
    )  # fmt: skip
    gpt2 = GPT2Config(
        vocab_size=13, n_embd=24, n_layer=2, n_head=3, n_inner=20, n_positions=16, initializer_range=0.2, **ends
    )
    return build_checkpoint(f"small-{request.param}", llama if request.param == "llama" else gpt2)


def limit_of_kl(model: Any, ids: Tensor, dense: Tensor, change: Tensor) -> float:
    """KL(0 || epsilon change) / epsilon^2 for a small epsilon; the mean over both signs is off by epsilon^2 only."""
    with torch.no_grad():
        clean, total = model(ids).logits, 0.0
        for epsilon in (-1e-3, 1e-3):
            dense += epsilon * change
            total += float(divergence(clean, model(ids).logits).mean()) / epsilon**2 / 2
            dense -= epsilon * change
    return total


def test_kl_over_epsilon_squared_tends_to_the_price(small: Path) -> None:
    """With all labels enumerated, 1/(2T) E (sum_t g_t . dY_t)^2 is the limit of KL(0 || epsilon dW) / epsilon^2.

    The gradients are the engine's, one pull for each (position, label); KL comes from the whole model in float64
    with the weights moved by +-epsilon, whose mean leaves an error of epsilon^2.
    """
    model, ids = load(small), tokens(1, 5, vocab=13, seed=3)
    with torch.no_grad():
        clean = model(ids).logits
    for name, module in linears(model).items():
        if name.endswith(("v_proj", "down_proj", "c_attn", "mlp.c_proj")):
            dense = weight(module)
            change = 0.1 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            expected = enumerate_labels(open_stream(small), ids, clean, name, change)
            assert limit_of_kl(model, ids, dense, change) == pytest.approx(expected, rel=CLOSE), name


def enumerate_labels(stream: Stream, ids: Tensor, logits: Tensor, module: str, change: Tensor) -> float:
    """1/(2T) sum over positions t' and labels y of p(y) (sum_t g_t . dY_t)^2, pulling the loss of (t', y) alone.

    Labels of different positions are independent and their scores have mean zero, so cross terms vanish.
    """
    length, probability = ids.shape[1], logits[0].softmax(-1).double()
    hidden, gradients = stream.store("h"), stream.store("g")
    forward(stream, [ids], hidden, keep=True)
    states = hidden.get((stream.depth, 0)).requires_grad_(True)
    losses = -stream.logits(states)[0].log_softmax(-1)
    labels = [(t, y) for t in range(length) for y in range(logits.shape[-1])]
    for k, (t, y) in enumerate(labels):
        gradients.put((0, k), torch.autograd.grad(losses[t, y], states, retain_graph=True)[0])
    total = 0.0

    def visit(index: int, block: nn.Module, inputs: Callable[[int], Tensor]) -> None:
        nonlocal total
        place = stream.anatomy.blocks[index]
        for k, (t, y) in enumerate(labels):
            pulled, flows = pull(stream, block, place, inputs(0), gradients.get((0, k)))
            gradients.put((0, k), pulled)
            if module in flows:
                x, g = flows[module].x.double(), flows[module].g.double()
                total += float(probability[t, y]) * float(((x @ change.T) * g).sum()) ** 2

    backward(stream, hidden, 1, visit)
    return total / 2 / length


def test_sampled_prices_estimate_the_same_limit(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The per-sequence price is an unbiased estimate of what a change costs, for every matrix."""
    recorder = Recorder()
    recorder.install(monkeypatch)
    ids = tokens(4, 3, vocab=13, seed=1)
    many = ids.repeat(1000, 1)  # each copy draws its own labels
    monkeypatch.setattr(pricing, "PRICED_TOKENS", many.numel())
    stream = open_stream(small, batch_tokens=6000)
    _, prices = price(stream, many, formats=["int3g16"], draws=1, folder=tmp_path)
    model = load(small)
    for i, group in enumerate(prices.groups):
        dense = weight(linears(model)[group.name])
        change = recorder.find(dense)[1]["int3g16"] - dense
        ratio = prices.nats_sequence[i, 0] / limit_of_kl(model, ids, dense, change)
        # A squared sum of about normal terms deviates by sqrt(2) of its mean: of 4000 draws by 2.2 %, of skewed ones by
        # more (the per-token standard error says so). Four deviations.
        deviation = max(2.0**0.5 / 4000**0.5, prices.stderr[i, 0] / prices.nats[i, 0])
        assert abs(ratio - 1) < 4 * deviation, group.name
        assert deviation < 0.05
