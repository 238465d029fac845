"""Sites against forward hooks on the whole model in transformers, on Llama with grouped heads and on GPT-2."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from circuitpress.errors import RecipeError
from circuitpress.mech.sites import NAMES, Site, SiteName, collect, rewriting, walk
from circuitpress.stream import open_stream

from ..whole import blocks_of, divergence, linears, load, tokens

PLACES = {"o": ("self_attn.o_proj", "attn.c_proj"), "down": ("mlp.down_proj", "mlp.c_proj")}


def module_of(model: Any, layer: int, part: str) -> Any:
    """The output projection of attention or of the MLP of a block, found by name."""
    return next(m for n, m in linears(model).items() if f".{layer}." in n and n.endswith(PLACES[part]))


def whole_site(model: Any, ids: Tensor, site: Site) -> Tensor:
    """What passes through a site, by hooks on the whole model."""
    seen: dict[str, Tensor] = {}
    handles = []
    for part in ("o", "down"):

        def keep(_: Any, args: tuple[Tensor, ...], output: Tensor, part: str = part) -> None:
            seen[f"{part}.in"], seen[f"{part}.out"] = args[0], output

        handles.append(module_of(model, site.layer, part).register_forward_hook(keep))
    with torch.no_grad():
        states = model.base_model(ids, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    found = {"head_out": "o.in", "attn_out": "o.out", "neurons": "down.in", "mlp_out": "down.out"}
    if site.name in found:
        return seen[found[site.name]]
    return states[site.layer + (site.name == "resid_post")]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_every_site_is_what_passes_there(name: str, layer: int, request: pytest.FixtureRequest) -> None:
    folder, ids = request.getfixturevalue(name), tokens(3, 7)
    model, stream = load(folder, torch.float32), open_stream(folder, batch_tokens=14)
    sites = [Site(layer, site) for site in NAMES]
    store = collect(stream, stream.batches(ids), sites)
    for site in sites:
        found = torch.cat([store.get((str(site), b)) for b in range(2)])
        assert found.shape == (3, 7, site.width(stream.anatomy))
        torch.testing.assert_close(found, whole_site(model, ids, site), rtol=1e-4, atol=1e-4)


def test_blocks_above_the_last_site_are_not_run(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, opened = open_stream(tiny_llama), []
    block = type(stream).block
    monkeypatch.setattr(type(stream), "block", lambda self, i: opened.append(i) or block(self, i))
    store = collect(stream, [tokens(1, 4)], [Site(0, "neurons"), Site(1, "resid_pre")])
    assert opened == [0, 1]
    assert ("L0.resid_pre", 0) not in store  # no more than what was asked for


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("checkpoint", ["tiny_llama", "tiny_gpt2"])
def test_rewriting_reaches_everything_that_reads_the_site(
    name: SiteName, checkpoint: str, request: pytest.FixtureRequest
) -> None:
    """Doubling a site, against hooks on the whole model; then the model is itself again."""
    folder, ids = request.getfixturevalue(checkpoint), tokens(2, 6)
    model, stream = load(folder, torch.float32), open_stream(folder)

    def visit(index: int, module: Any, _: int, hidden: Tensor) -> Tensor:
        if index != 1:
            return stream.run(index, module, hidden)
        with rewriting(stream, 1, module, name, lambda x: 2 * x):
            return stream.run(index, module, hidden)

    changed = stream.logits(walk(stream, [ids], visit).get((stream.depth, 0)))
    block, o, down = blocks_of(model)[1], module_of(model, 1, "o"), module_of(model, 1, "down")
    double: Any = {
        "resid_pre": lambda: block.register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:])),
        "resid_post": lambda: block.register_forward_hook(
            lambda _, __, out: (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out
        ),
        "head_out": lambda: o.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
        "neurons": lambda: down.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
        "attn_out": lambda: o.register_forward_hook(lambda _, __, out: 2 * out),
        "mlp_out": lambda: down.register_forward_hook(lambda _, __, out: 2 * out),
    }
    with torch.no_grad():
        clean = model(ids).logits
        handle = double[name]()
        expected = model(ids).logits
        handle.remove()
    torch.testing.assert_close(changed, expected, rtol=1e-3, atol=1e-3)
    assert float(divergence(clean, expected).mean()) > 1e-3
    after = walk(stream, [ids], lambda i, m, _, h: stream.run(i, m, h)).get((stream.depth, 0))
    torch.testing.assert_close(stream.logits(after), clean, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_read_back(name: SiteName) -> None:
    site = Site(12, name)
    assert Site.parse(str(site)) == site == Site.parse(site.hook)
    assert site.hook.startswith("blocks.12.")


def test_the_names_of_the_transformer_bridge_are_known() -> None:
    assert Site.parse("blocks.3.hook_out") == Site(3, "resid_post")
    assert Site.parse("blocks.3.attn.o.hook_in") == Site(3, "head_out")


@pytest.mark.parametrize("text", ["L3", "L3.resid_mid", "blocks.1.hook_pattern", "resid_post", "L-1.neurons"])
def test_what_is_no_site_is_named(text: str) -> None:
    with pytest.raises(RecipeError, match="is not a site"):
        Site.parse(text)


def test_a_layer_beyond_the_model_is_an_error(tiny_llama: Path) -> None:
    with pytest.raises(RecipeError, match="layers 0 to 2"):
        Site(3, "neurons").width(open_stream(tiny_llama).anatomy)
