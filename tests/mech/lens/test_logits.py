"""The logit lens against transformers' hidden states, its final norm and its unembedding."""

import pytest
import torch

from circuitpress.mech.lens.logits import logit_lens
from circuitpress.stream import open_stream

from ...whole import divergence, load, tokens


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen2", "tiny_gpt2"])
def test_against_hidden_states(name: str, request: pytest.FixtureRequest) -> None:
    folder, ids = request.getfixturevalue(name), tokens(5, 8)
    model = load(folder)
    norm = model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm
    kept = []
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    handles = [block.register_forward_pre_hook(lambda _, args: kept.append(args[0])) for block in blocks]
    handles.append(norm.register_forward_pre_hook(lambda _, args: kept.append(args[0])))
    with torch.no_grad():
        final = model(ids).logits
        for handle in handles:
            handle.remove()
        lens = [model.lm_head(norm(x)) for x in kept]
    depths, guesses = logit_lens(open_stream(folder, batch_tokens=16), ids, shown=[2, 7])
    assert [row.blocks for row in depths] == list(range(len(lens)))
    for row, logits in zip(depths, lens, strict=True):
        kl = divergence(final, logits)
        assert row.kl == pytest.approx(float(kl.mean()), rel=1e-3, abs=1e-6)
        assert row.kl_stderr == pytest.approx(float(kl.mean(1).std() / 5**0.5), rel=1e-2, abs=1e-6)
        agree = (final.argmax(-1) == logits.argmax(-1)).double().mean()
        assert row.top1_agreement == pytest.approx(float(agree))
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert row.loss == pytest.approx(float(loss), rel=1e-3)
    assert (depths[-1].kl, depths[-1].top1_agreement) == (pytest.approx(0, abs=1e-9), 1)
    for guess in guesses:
        p = lens[guess.blocks][0, guess.position].softmax(-1)
        assert guess.token == int(p.argmax())
        assert guess.probability == pytest.approx(float(p.max()), rel=1e-3)
    assert len(guesses) == 2 * len(lens)
