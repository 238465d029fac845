"""Reads SAEs as others publish them, and writes SAELens folders; only safetensors and plain numpy arrays, no pickle.

| form | files | what it leaves to the reader |
|---|---|---|
| SAELens 6 | cfg.json, sae_weights.safetensors | nothing; read and written back, both files are the same bytes |
| Gemma Scope | params.npz (W_enc, W_dec, b_enc, b_dec, threshold) | JumpReLU, b_dec not subtracted; site: its path |
| sparsify | cfg.json, sae.safetensors (encoder.*, W_dec, b_dec) | TopK, b_dec subtracted; site: its folder's name |

What cannot be represented (transcoders, gated encoders, whitening) is refused by name, since an encoder that is
nearly right looks like a bad SAE and not like an error.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ...errors import CircuitpressError
from ...files import write_bytes_atomic
from ..sites import Site, SiteName
from .value import Sae

log = logging.getLogger(__name__)

_ARCHITECTURES = {"standard": "standard", "topk": "topk", "jumprelu": "jumprelu", "batchtopk": "jumprelu"}
_FORMS = "an SAELens folder (sae_weights.safetensors), a Gemma Scope params.npz or a sparsify folder (sae.safetensors)"


def load_sae(path: Path, *, site: Site | None = None) -> Sae:
    """The SAE in a folder or .npz file; `site` overrides what it says about where it reads. CircuitpressError."""
    readers = {
        "sae_weights.safetensors": _read_sae_lens,
        "params.npz": _read_gemma_scope,
        "sae.safetensors": _read_sparsify,
    }
    if path.suffix == ".npz" and path.is_file():
        file, reader = path, _read_gemma_scope
    else:
        found = [(path / name, reader) for name, reader in readers.items() if (path / name).is_file()]
        if not found:
            raise CircuitpressError(
                f"{path} is no SAE", hint=f"pass {_FORMS}; train one with: circuitpress sae train --help"
            )
        file, reader = found[0]
    try:
        sae = reader(file)
    except (KeyError, ValueError, OSError, SafetensorError) as error:
        cause = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise CircuitpressError(f"{file} cannot be read as an SAE: {cause}", hint="download it again") from error
    return sae if site is None else replace(sae, site=site)


def save_sae(sae: Sae, folder: Path) -> None:
    """Writes an SAELens folder: cfg.json, then sae_weights.safetensors, each atomically."""
    config: dict[str, Any] = dict(sae.config)
    # Without a version of 6 or more SAELens takes the folder for an old one and drops its metadata.
    metadata = {"sae_lens_version": "6.0.0", "hook_name": sae.site.hook if sae.site else None}
    own = {
        "d_in": sae.width,
        "d_sae": sae.latents,
        "dtype": str(sae.w_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtract_bias,
        "normalize_activations": sae.normalisation,
        "reshape_activations": "none",
        "metadata": metadata | {"circuitpress_skip": sae.skip},
        "architecture": sae.architecture,
    }
    if sae.architecture == "topk":
        own |= {"k": sae.k, "rescale_acts_by_decoder_norm": sae.by_decoder_norm}
    for key, value in own.items():  # what the folder said stays, byte for byte
        config.setdefault(key, value)
    tensors = {"W_enc": sae.w_enc, "b_enc": sae.b_enc, "W_dec": sae.w_dec, "b_dec": sae.b_dec} | dict(sae.extra)
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold
    write_bytes_atomic(folder / "cfg.json", json.dumps(config).encode())
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes_atomic(folder / "sae_weights.safetensors", save(whole))


def _read_sae_lens(file: Path) -> Sae:
    config = json.loads((file.parent / "cfg.json").read_text())
    tensors = load_file(file)
    name = config.get("architecture", "standard")
    if name not in _ARCHITECTURES:
        raise ValueError(f"architecture {name!r} is not supported; supported are {', '.join(_ARCHITECTURES)}")
    metadata = config.get("metadata") or {}
    normalisation = config.get("normalize_activations") or "none"
    if normalisation not in ("none", "layer_norm", "constant_norm_rescale"):
        raise ValueError(
            f"normalize_activations is {normalisation!r}, whose factor is not in the folder: fold it in with SAELens"
        )
    if (metadata.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights"):
        log.warning("%s was trained on centred activations: here it sees them with their mean", file.parent)
    hook = metadata.get("hook_name") or config.get("hook_name")
    weights = {name: tensors.pop(name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    threshold = tensors.pop("threshold", None)
    return Sae(
        weights["W_enc"], weights["b_enc"], weights["W_dec"], weights["b_dec"],
        architecture=_ARCHITECTURES[name],  # pyright: ignore[reportArgumentType]
        threshold=threshold,
        k=int(config["k"]) if name == "topk" else None,
        subtract_bias=bool(config.get("apply_b_dec_to_input", True)),
        normalisation=normalisation,
        by_decoder_norm=name == "topk" and bool(config.get("rescale_acts_by_decoder_norm", False)),
        site=_known_site(hook),
        skip=int(metadata.get("circuitpress_skip") or 0),
        config=config,
        extra=tensors,
    )  # fmt: skip


def _read_gemma_scope(file: Path) -> Sae:
    with np.load(file, allow_pickle=False) as arrays:
        # The first releases wrote w_enc for W_enc.
        tensors = {name.replace("w_", "W_"): torch.from_numpy(arrays[name]) for name in arrays.files}
    factor = tensors.get("scaling_factor")
    if factor is not None and not bool(torch.allclose(factor, torch.ones_like(factor))):
        raise ValueError("it has a scaling_factor after the activation, which is not supported")
    d, w_enc, w_dec = tensors["W_enc"].shape[0], tensors["W_enc"], tensors["W_dec"]
    where = str(file.parent)
    if "embedding" in where:  # trained on embeddings times sqrt(d), which the model itself does
        w_enc, w_dec = w_enc / d**0.5, w_dec * d**0.5
    layer = re.search(r"layer_(\d+)", where)
    place = "mlp_out" if "mlp" in where else "head_out" if re.search(r"\batt|-att", where) else "resid_post"
    return Sae(
        w_enc, tensors["b_enc"], w_dec, tensors["b_dec"], "jumprelu", tensors["threshold"], subtract_bias=False,
        site=Site(int(layer[1]), place) if layer else None,
    )  # fmt: skip


def _read_sparsify(file: Path) -> Sae:
    config: Mapping[str, Any] = json.loads((file.parent / "cfg.json").read_text())
    tensors = load_file(file)
    if config.get("transcode") or "W_skip" in tensors:
        raise ValueError("it is a transcoder: it predicts another site than the one it reads")
    if (activation := config.get("activation", "topk")) != "topk":
        raise ValueError(f"activation {activation!r} is not supported; supported is topk")
    w_enc = tensors["encoder.weight"].T.contiguous()
    return Sae(
        w_enc, tensors["encoder.bias"], tensors["W_dec"], tensors["b_dec"], "topk", k=int(config["k"]),
        site=_sparsify_site(file.parent.name),
    )  # fmt: skip


def _sparsify_site(hookpoint: str) -> Site | None:
    """`layers.4` is the output of block 4; `h.4.mlp` what its MLP adds; `embed_tokens` and others are no site here."""
    match = re.fullmatch(r"(?:model\.|transformer\.)*(?:layers|h)\.(\d+)(?:\.([a-z_]+))?", hookpoint)
    places: dict[str | None, SiteName] = {
        None: "resid_post",
        "mlp": "mlp_out",
        "self_attn": "attn_out",
        "attn": "attn_out",
    }
    return Site(int(match[1]), places[match[2]]) if match and match[2] in places else None


def _known_site(hook: Any) -> Site | None:
    try:
        return Site.parse(str(hook))
    except CircuitpressError:
        return None


def describe(sae: Sae) -> dict[str, Any]:
    """What to record beside every number measured with an SAE."""
    return {
        "site": str(sae.site) if sae.site else None,
        "architecture": sae.architecture,
        "latents": sae.latents,
        "width": sae.width,
        "k": sae.k,
        "skip": sae.skip,
    }
