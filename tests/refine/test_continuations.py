"""Text that the model writes itself: where it begins, what it repeats, and that it is sampled from the softmax."""

from pathlib import Path

import torch

from circuitpress.refine.continuations import PROMPT, continuations

from ..whole import load, tokens


def test_windows_begin_like_the_calibration_text_in_turn(tiny_llama: Path) -> None:
    windows = tokens(5, 20)
    written = continuations(tiny_llama, windows, count=12, batch=5)
    assert written.shape == (12, 20)
    assert written.dtype == torch.int64
    assert torch.equal(written[:, :PROMPT], windows[torch.arange(12) % 5, :PROMPT])


def test_the_seed_alone_decides(tiny_llama: Path) -> None:
    windows = tokens(3, 20)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = continuations(tiny_llama, windows, count=4, seed=7)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, continuations(tiny_llama, windows, count=4, seed=7))
    assert not torch.equal(first, continuations(tiny_llama, windows, count=4, seed=8))


def test_tokens_are_drawn_from_the_model_s_softmax(tiny_llama: Path) -> None:
    windows = tokens(1, PROMPT + 1)
    drawn = continuations(tiny_llama, windows, count=20_000, batch=20_000)[:, -1]
    with torch.no_grad():
        expected = load(tiny_llama, torch.float32)(windows[:, :PROMPT]).logits[0, -1].softmax(-1)
    seen = torch.bincount(drawn, minlength=len(expected)) / len(drawn)
    spread = (expected * (1 - expected) / len(drawn)).sqrt()
    assert ((seen - expected).abs() < 5 * spread + 1e-4).all()


def test_later_tokens_follow_the_whole_text_and_not_the_cache_alone(tiny_llama: Path) -> None:
    windows = tokens(2, 15)
    written = continuations(tiny_llama, windows, count=2, seed=3, batch=2)
    model = load(tiny_llama, torch.float32)
    torch.manual_seed(3)
    ids = windows[:, :PROMPT]
    with torch.no_grad():
        while ids.shape[1] < 15:
            ids = torch.cat([ids, model(ids).logits[:, -1].softmax(-1).multinomial(1)], 1)
    assert torch.equal(written, ids)
