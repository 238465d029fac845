"""Hand-made folders in the layouts of SAELens, Gemma Scope and sparsify; what cannot be represented is refused."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from circuitpress.errors import CircuitpressError
from circuitpress.mech.sae import load_sae, save_sae
from circuitpress.mech.sites import Site

from .test_value import D, N, random_sae


def sae_lens_folder(folder: Path, architecture: str, /, **config: Any) -> Path:
    """A folder as SAELens 6 writes it: json.dump without indent, safetensors without metadata."""
    folder.mkdir()
    sae = random_sae("jumprelu" if architecture == "jumprelu" else "standard")
    tensors = {"b_dec": sae.b_dec, "W_dec": sae.w_dec, "W_enc": sae.w_enc, "b_enc": sae.b_enc}
    if architecture == "jumprelu":
        assert sae.threshold is not None
        tensors["threshold"] = sae.threshold
    save_file(tensors, folder / "sae_weights.safetensors")
    document = {
        "d_in": D, "d_sae": N, "dtype": "float32", "device": "cuda", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "model_name": "gpt2", "hook_name": "blocks.2.hook_resid_pre",
                     "context_size": 128, "neuronpedia_id": None, "dataset_path": "pile \u00e9"},
        "architecture": architecture,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(document | config))
    return folder


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("standard", {"apply_b_dec_to_input": False}),
        ("topk", {"k": 4, "rescale_acts_by_decoder_norm": True}),
        ("jumprelu", {"normalize_activations": "layer_norm"}),
    ],
)
def test_sae_lens_round_trip_is_bit_for_bit(architecture: str, config: dict[str, Any], tmp_path: Path) -> None:
    folder = sae_lens_folder(tmp_path / "in", architecture, **config)
    sae = load_sae(folder)
    assert sae.site == Site(2, "resid_pre")
    assert (sae.width, sae.latents, sae.architecture) == (D, N, architecture)
    assert sae.subtract_bias == config.get("apply_b_dec_to_input", True)
    assert sae.k == config.get("k")
    assert sae.by_decoder_norm == config.get("rescale_acts_by_decoder_norm", False)
    save_sae(sae, tmp_path / "out")
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_our_own_are_read_back_bit_for_bit(tmp_path: Path) -> None:
    for number, sae in enumerate((random_sae(skip=1), random_sae("jumprelu"), random_sae("standard"))):
        save_sae(sae, tmp_path / f"{number}")
        back = load_sae(tmp_path / f"{number}")
        for name in ("w_enc", "b_enc", "w_dec", "b_dec"):
            assert torch.equal(getattr(back, name), getattr(sae, name))
        assert (back.site, back.skip, back.k, back.architecture) == (sae.site, sae.skip, sae.k, sae.architecture)
        config = json.loads((tmp_path / f"{number}" / "cfg.json").read_text())
        assert (config["d_in"], config["d_sae"], config["metadata"]["hook_name"]) == (D, N, "blocks.1.hook_resid_post")
        assert config["metadata"]["sae_lens_version"].startswith("6.")  # else SAELens 6 drops the metadata


@pytest.mark.parametrize("case", ["W_", "w_"])
def test_gemma_scope(case: str, tmp_path: Path) -> None:
    """JumpReLU by hand; the site is in the path, the file alone may be passed too."""
    sae = random_sae("jumprelu", subtract_bias=False)
    folder = tmp_path / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    assert sae.threshold is not None
    arrays = {f"{case}enc": sae.w_enc, f"{case}dec": sae.w_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    np.savez(folder / "params.npz", threshold=sae.threshold.numpy(), **{k: v.numpy() for k, v in arrays.items()})
    x = torch.randn(6, D, generator=torch.Generator().manual_seed(5))
    pre = x @ sae.w_enc + sae.b_enc
    expected = torch.where(pre > sae.threshold, pre.relu(), 0) @ sae.w_dec + sae.b_dec
    for path in (folder, folder / "params.npz"):
        loaded = load_sae(path)
        assert loaded.site == Site(20, "resid_post")
        torch.testing.assert_close(loaded.reconstruct(x), expected)
    assert load_sae(folder, site=Site(3, "mlp_out")).site == Site(3, "mlp_out")


def test_gemma_scope_never_unpickles(tmp_path: Path) -> None:
    np.savez(tmp_path / "params.npz", W_enc=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(CircuitpressError, match="allow_pickle=False"):
        load_sae(tmp_path)


def sparsify_folder(folder: Path, **config: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder as sparsify writes it: encoder.weight [n, d], W_dec [n, d]."""
    folder.mkdir()
    sae = random_sae()
    encoder = {"encoder.weight": sae.w_enc.T.contiguous(), "encoder.bias": sae.b_enc}
    tensors = encoder | {"W_dec": sae.w_dec, "b_dec": sae.b_dec}
    save_file(tensors, folder / "sae.safetensors")
    document = {"activation": "topk", "expansion_factor": 32, "k": 3, "d_in": D, "num_latents": 0, "transcode": False}
    (folder / "cfg.json").write_text(json.dumps(document | config))
    return folder, tensors


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("layers.4", Site(4, "resid_post")),
        ("layers.10.mlp", Site(10, "mlp_out")),
        ("h.0.attn", Site(0, "attn_out")),
        ("embed_tokens", None),
    ],
)
def test_sparsify(name: str, site: Site | None, tmp_path: Path) -> None:
    folder, tensors = sparsify_folder(tmp_path / name)
    sae = load_sae(folder)
    assert (sae.site, sae.k) == (site, 3)
    x = torch.randn(6, D, generator=torch.Generator().manual_seed(6))
    # As sparsify does it: a linear map of x - b_dec, relu, the k largest, a sum of decoder rows.
    pre = torch.nn.functional.linear(x - tensors["b_dec"], tensors["encoder.weight"], tensors["encoder.bias"]).relu()
    values, index = pre.topk(3)
    expected = tensors["b_dec"] + (values[..., None] * tensors["W_dec"][index]).sum(1)
    torch.testing.assert_close(sae.reconstruct(x), expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "gated"}, "architecture 'gated' is not supported"),
        ({"normalize_activations": "expected_average_only_in"}, "factor is not in the folder"),
        ({"architecture": "topk"}, "it has no 'k'"),
    ],
)
def test_what_sae_lens_has_and_we_have_not(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CircuitpressError, match=message):
        load_sae(sae_lens_folder(tmp_path / "in", "standard", **config))


@pytest.mark.parametrize(
    ("config", "message"), [({"transcode": True}, "transcoder"), ({"activation": "groupmax"}, "groupmax")]
)
def test_what_sparsify_has_and_we_have_not(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CircuitpressError, match=message):
        load_sae(sparsify_folder(tmp_path / "layers.1", **config)[0])


def test_a_folder_without_an_sae_and_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(CircuitpressError, match="is no SAE"):
        load_sae(tmp_path)
    folder = sae_lens_folder(tmp_path / "in", "standard")
    (folder / "sae_weights.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(CircuitpressError, match="cannot be read as an SAE"):
        load_sae(folder)


def test_centred_training_activations_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metadata = {"hook_name": "blocks.0.hook_out", "model_from_pretrained_kwargs": {"center_writing_weights": True}}
    with caplog.at_level(logging.WARNING):
        assert load_sae(sae_lens_folder(tmp_path / "in", "standard", metadata=metadata)).site == Site(0, "resid_post")
    assert "centred activations" in caplog.text
