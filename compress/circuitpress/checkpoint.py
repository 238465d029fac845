"""A checkpoint on disk: its headers first, its tensors on demand.

1. `resolve_checkpoint` turns what the user typed (a folder, or a Hub id with @revision) into a local folder.
2. `read_headers` reads config.json and the safetensors headers, no weights, and refuses what cannot work: no config, no
   safetensors, a truncated file, a model that some other tool already quantized.
3. `Weights` reads single tensors. A packed model of ours reads like a dense one: its codes are decoded on the way; so
   does one that bitsandbytes packed.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import bnb
from .errors import CheckpointError

if TYPE_CHECKING:
    import torch

METHOD = "circuitpress"
"""The `quant_method` of our own models."""

_DTYPE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class TensorHeader:
    """Where one tensor lies and what it is; `dtype` is the safetensors code (F32, BF16, U8, ...)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Headers:
    """config.json and the headers of all safetensors files of one folder.

    `foreign` are the modules that bitsandbytes packed: rows, columns and what `bnb.decode` needs to know.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorHeader]
    foreign: Mapping[str, tuple[int, int, dict[str, Any]]] = field(default_factory=dict)

    @property
    def rounded_by(self) -> str | None:
        """What quantized this model, `circuitpress` or `bitsandbytes`; None for an ordinary checkpoint."""
        return (self.config.get("quantization_config") or {}).get("quant_method")

    @property
    def packed(self) -> Mapping[str, Any]:
        """Our own packed modules: module name -> descriptor; empty for an ordinary checkpoint."""
        return (self.config.get("quantization_config") or {}).get("modules", {})

    @property
    def file_bytes(self) -> int:
        """Size of all weight files."""
        return sum(file.stat().st_size for file in {header.file for header in self.tensors.values()})

    def dtype(self, name: str) -> str:
        """The torch name of a floating tensor's type; CheckpointError for anything else."""
        code = self.tensors[name].dtype
        if code not in _DTYPE:
            hint = "compress the original checkpoint in float32, float16 or bfloat16"
            raise CheckpointError(f"{self.folder}: tensor {name} is stored as {code}", hint=hint)
        return _DTYPE[code]


def resolve_checkpoint(model: str, *, trust_remote_code: bool = False) -> Path:
    """The local folder of a checkpoint: `model` itself, or the snapshot of a Hub id `user/name[@revision]`.

    Raises CheckpointError when there is neither such a folder nor such a repository.
    """
    folder = Path(model).expanduser()
    if folder.exists():
        return folder
    repo, _, revision = model.partition("@")
    if model.startswith((".", "/", "~")) or repo.count("/") != 1:
        raise CheckpointError(
            f"{model}: no such folder", hint="pass a checkpoint folder or a Hub id user/name[@revision]"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*"]
    patterns += ["README.md", *(["*.py"] if trust_remote_code else [])]
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns))
    except GatedRepoError as error:
        cause, hint = (
            "asks for a licence to be accepted",
            f"accept it on https://huggingface.co/{repo}, then: hf auth login",
        )
        raise CheckpointError(f"{model}: the repository {cause}", hint=hint) from error
    except RepositoryNotFoundError as error:
        hint = "check the spelling; a private repository needs: hf auth login"
        raise CheckpointError(f"{model}: no such folder, and no such repository on the Hub", hint=hint) from error
    except RevisionNotFoundError as error:
        hint = f"take another branch, tag or commit, or none: {repo}"
        raise CheckpointError(f"{repo}: the repository has no revision {revision!r}", hint=hint) from error
    except LocalEntryNotFoundError as error:
        hint = "check the network (HF_HUB_OFFLINE too), or download it elsewhere and pass the folder"
        raise CheckpointError(f"{model}: no such folder, and the Hub cannot be reached", hint=hint) from error
    except HfHubHTTPError as error:
        hint = "check the spelling and the revision; for a private model run: hf auth login"
        raise CheckpointError(f"{model}: no such folder, and the Hub answers: {error}", hint=hint) from error


def read_headers(folder: Path, *, packed_ok: bool = False) -> Headers:
    """Reads and validates config.json and all safetensors headers of `folder`.

    `packed_ok` admits a model that circuitpress or bitsandbytes packed. Raises CheckpointError.
    """
    config = _read_config(folder)
    quantization = config.get("quantization_config")
    method = None if quantization is None else quantization.get("quant_method", "unknown method")
    if method is not None and not (packed_ok and method in (METHOD, bnb.METHOD)):
        hint = "pass the checkpoint that it was made from: rounding what is already rounded loses twice"
        looks = "; circuitpress inspect, sae, circuit, audit and eval look into it as it is"
        hint += looks if method in (METHOD, bnb.METHOD) else ""
        raise CheckpointError(f"{folder} is already quantized ({method})", hint=hint)
    tensors: dict[str, TensorHeader] = {}
    for file in _weight_files(folder):
        tensors |= _read_file_header(file)
    if method != bnb.METHOD:
        return Headers(folder, config, tensors)
    shapes = {name: header.shape for name, header in tensors.items()}
    return Headers(folder, config, tensors, bnb.packed_modules(shapes, lambda name: _bytes_of(tensors[name], name)))


def _bytes_of(header: TensorHeader, name: str) -> bytes:
    """A small tensor, without torch."""
    from safetensors import safe_open

    with safe_open(header.file, framework="np") as file:
        return file.get_tensor(name).tobytes()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not folder.is_dir() or not path.is_file():
        cause = "is not a folder" if not folder.is_dir() else "has no config.json"
        hint = "pass the folder that save_pretrained wrote: config.json, *.safetensors, tokenizer files"
        raise CheckpointError(f"{folder} {cause}", hint=hint)
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    hint = "download or save the checkpoint again"
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}", hint=hint) from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} holds a {type(document).__name__}, not an object", hint=hint)
    return document


def _weight_files(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        named = _read_json(index).get("weight_map")
        if not isinstance(named, dict):
            raise CheckpointError(f"{index} has no weight_map", hint="download or save the checkpoint again")
        files = [folder / name for name in sorted(set(named.values()))]
    elif single.is_file():
        files = [single]
    else:
        legacy = next(folder.glob("pytorch_model*.bin"), None)
        cause = f"has only {legacy.name} (pickle is never read)" if legacy else "has no model.safetensors"
        hint = "load it once with transformers and save_pretrained(..., safe_serialization=True)"
        raise CheckpointError(f"{folder} {cause}", hint=hint)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        hint = "download the missing files again"
        raise CheckpointError(f"{folder}: {index.name} names {', '.join(missing)}, which are not there", hint=hint)
    return files


def _read_file_header(file: Path) -> dict[str, TensorHeader]:
    size = file.stat().st_size
    hint = "the file is damaged or was not downloaded completely: fetch it again"
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise CheckpointError(f"{file} is truncated: its header does not fit in {size} bytes", hint=hint)
        try:
            entries = json.loads(stream.read(length))
            entries.pop("__metadata__", None)
            result = {name: _tensor_header(file, entry) for name, entry in entries.items()}
            end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} is not a safetensors file: {error}", hint=hint) from error
    if end != size:
        raise CheckpointError(f"{file} is truncated: {size} bytes where its header promises {end}", hint=hint)
    return result


def _tensor_header(file: Path, entry: Mapping[str, Any]) -> TensorHeader:
    begin, stop = entry["data_offsets"]
    return TensorHeader(file, entry["dtype"], tuple(entry["shape"]), stop - begin)


class Weights:
    """The tensors of a checkpoint by their name in the model, read one at a time, decoded if they are packed.

    `prefix` is the model's base prefix (`transformer.`): some GPT-2 checkpoints leave it out of their tensor names.
    """

    def __init__(self, headers: Headers, prefix: str) -> None:
        self._headers = headers
        self._prefix = prefix

    def stored_name(self, name: str) -> str | None:
        """The name under which a parameter is stored, or None."""
        for candidate in (name, name.removeprefix(self._prefix)):
            if candidate in self._headers.tensors:
                return candidate
        return None

    def model_name(self, stored: str) -> str:
        """The parameter's name in the model: the inverse of `stored_name`."""
        outside = stored.startswith((self._prefix, "lm_head."))
        return stored if outside else self._prefix + stored

    def read(self, name: str) -> "torch.Tensor":
        """The tensor as stored; CheckpointError if it is missing, or if it holds NaN or infinity."""
        return self._finite(name, self._stored(name))

    def _finite(self, name: str, tensor: "torch.Tensor") -> "torch.Tensor":
        import torch

        # The extremes of a tensor are NaN if anything in it is; a mask of it all would take as much memory again.
        if tensor.is_floating_point() and tensor.numel() and not bool(torch.stack(tensor.aminmax()).isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            hint = "no method can price such weights: fix or download the checkpoint again"
            raise CheckpointError(
                f"{self._headers.folder}: tensor {name} holds {bad} NaN or infinite values", hint=hint
            )
        return tensor

    def _stored(self, name: str) -> "torch.Tensor":
        from safetensors import safe_open

        stored = self.stored_name(name)
        if stored is None:
            hint = "the checkpoint is incomplete or of another architecture: download it again"
            raise CheckpointError(f"{self._headers.folder} has no tensor {name}", hint=hint)
        with safe_open(self._headers.tensors[stored].file, framework="pt") as file:
            return file.get_tensor(stored)

    def is_packed(self, module: str) -> bool:
        """Whether this module is stored as codes, ours or those of bitsandbytes."""
        return module in self._headers.packed or module in self._headers.foreign

    def packed(self, module: str) -> "dict[str, torch.Tensor]":
        """The flat tensors of a module in our packed form, by the names that its formats give them."""
        from .formats import parse, segment_shape

        entry = self._headers.packed[module]
        shapes = [segment_shape(entry["shape"], entry["axis"], s["start"], s["stop"]) for s in entry["segments"]]
        layouts = [parse(s["format"]).layout(*shape) for s, shape in zip(entry["segments"], shapes, strict=True)]
        names = dict.fromkeys(name for layout in layouts for name in layout)
        return {name: self.read(f"{module}.{name}") for name in names}

    def decode(self, module: str) -> "torch.Tensor":
        """The weights of a packed module, float32 [rows, cols]."""
        from .formats import decode_segments

        if module in self._headers.foreign:
            # Read without that check: codes that are stored as a floating type may look like NaN.
            return self._finite(module, bnb.decode(self._stored, module, *self._headers.foreign[module]))
        entry = self._headers.packed[module]
        return decode_segments(self.packed(module), entry["shape"], entry["axis"], entry["segments"])
