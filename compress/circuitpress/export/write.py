"""Writes an export: refuse, convert shard by shard, collect, check, rename.

1. Whatever the target cannot hold is named, all of it at once (plan/targets.py); nothing is converted on the way, since
   rounding what is rounded loses twice.
2. Packed matrices become the target's tensors, one shard a decoder block, so that one block is in memory; everything
   else is copied as it is.
3. Config, tokenizer, chat template and licence join them in a folder beside `out`.
4. Its logits are checked in a fresh process; only then it gets its name. export.json says what was found.
"""

import importlib.metadata
import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from .. import __version__
from ..assemble import METADATA, assemble
from ..checkpoint import read_headers
from ..console import Advance, ignore
from ..errors import CircuitpressError, RecipeError
from ..files import write_bytes_atomic
from ..formats import Format
from ..plan.serving import vllm_problems
from ..plan.targets import option_problem, plan_problems
from ..units import Segment
from . import absmax, packed
from .check import check, packed_logits, token_windows
from .source import Source

RECORD = "export.json"


@dataclass(frozen=True)
class Export:
    """How a target stores matrices: None for `encode` means as plain numbers. `package` is what loads the folder."""

    encode: Callable[[Format, Any, torch.dtype], dict[str, Tensor]] | None
    config: Callable[[Source, torch.dtype], dict[str, Any]] | None
    package: str | None


EXPORTS = {
    "compressed-tensors": Export(packed.encode, packed.config, packed.PACKAGE),
    "bitsandbytes": Export(absmax.encode, absmax.config, absmax.PACKAGE),
    "dense": Export(None, None, None),
}
_EXTRA = {"compressed_tensors": "vllm-format", "bitsandbytes": "bnb", "gguf": "gguf"}


def refuse(source: Source, target: str, out: Path) -> None:
    """Raises what `export` would raise before it writes: RecipeError with every reason, CircuitpressError."""
    problems = plan_problems(target, source.stored())
    for matrix in source.anatomy.outer:
        segment = Segment(matrix.module, "rows", 0, matrix.rows, matrix.rows, matrix.cols)
        found = (option_problem(target, form, segment, outer=True) for form in source.formats(matrix.module))
        problems += [problem for problem in found if problem]
    if target == "compressed-tensors" and any(matrix.transposed for matrix in source.matrices.values()):
        problems.append(f"{source.anatomy.model_type} has Conv1D layers, which compressed-tensors does not pack")
    if problems:
        shown = [*problems[:8], *([f"... and {len(problems) - 8} more"] if len(problems) > 8 else [])]
        hint = f"score and plan for it: circuitpress run RECIPE --set plan.target={target}; or --format dense"
        raise RecipeError([f"{source.folder} cannot be {target}:", *shown], hint=hint)
    require(EXPORTS[target].package)
    refuse_foreign(out)


def require(package: str | None) -> None:
    """CircuitpressError if the package that loads an export is not there: what cannot be checked is not written."""
    if package is not None and importlib.util.find_spec(package) is None:
        message = f"{package.replace('_', '-')} is not installed, and the export is checked with it"
        raise CircuitpressError(message, hint=f"pip install 'circuitpress[{_EXTRA[package]}]'")


def refuse_foreign(out: Path) -> None:
    """CircuitpressError if `out` holds anything that no export wrote."""
    if out.exists() and not (out / RECORD).exists() and (not out.is_dir() or any(out.iterdir())):
        raise CircuitpressError(f"{out} is there already and is no export", hint="pass another --out")


def preview(source: Source, target: str, out: Path) -> dict[str, Any]:
    """What an export would say of itself before it is written: `refuse`, then formats and vLLM's advice."""
    refuse(source, target, out)
    stored = source.stored()
    counts: dict[str, int] = {}
    for entry in stored.values():
        for form in dict.fromkeys(entry.formats):
            counts[form] = counts.get(form, 0) + 1
    advice = vllm_problems(stored, advice=True) if target == "compressed-tensors" else []
    return {"format": target, "source": str(source.folder), "matrices": counts, "advice": advice}


def export(
    source: Source, target: str, out: Path, *, dtype: torch.dtype | None = None, advance: Advance = ignore
) -> dict[str, Any]:
    """Writes the folder `out` for `target` (a key of `EXPORTS`) and returns what export.json holds.

    `dtype` is the floating type of everything that is not packed; None keeps the checkpoint's. An earlier export at
    `out` is replaced. Raises RecipeError if the target cannot hold the model, CircuitpressError if the folder that was
    written computes something else; then nothing is left.
    """
    document = preview(source, target, out)
    kind, own = EXPORTS[target], getattr(torch, source.anatomy.dtype)
    shards, candidate = (out.with_name(f".{out.name}.{part}") for part in ("shards", "unchecked"))
    try:
        paths = []
        for k, names in enumerate(source.shards()):
            path = shards / f"{k:05d}.safetensors"
            write_bytes_atomic(path, save(_convert(source, kind, names, dtype, own), metadata=METADATA))
            paths.append(path)
            advance(1, f"wrote shard {k}")
        assemble(source.folder, _config(source, kind, dtype, own), paths, candidate)
        shutil.rmtree(shards)
        rounded = (dtype or own) if kind.encode is None else None
        document |= verify(source.folder, candidate, rounded=rounded, cast=dtype)
        document["versions"] |= _version_of(kind.package)
        publish(candidate, out, document)
    finally:
        shutil.rmtree(shards, ignore_errors=True)
        shutil.rmtree(candidate, ignore_errors=True)
    return document


def verify(
    reference: Path, candidate: Path, *, rounded: torch.dtype | None = None, cast: torch.dtype | None = None
) -> dict[str, Any]:
    """Checks `candidate` against the model in `reference` (see `packed_logits`): what export.json says of that."""
    headers = read_headers(reference, packed_ok=True).config
    context = headers.get("max_position_embeddings", headers.get("n_positions", 0))
    ids = token_windows(headers["vocab_size"], context)
    checked = check(candidate, ids, packed_logits(reference, ids, rounded=rounded, cast=cast))
    versions = {"circuitpress": __version__, "torch": torch.__version__}
    files = sum(file.stat().st_size for file in candidate.glob("*.safetensors"))
    return {"bytes": files, "check": checked.to_json(), "versions": versions | _version_of("transformers")}


def publish(candidate: Path, out: Path, document: Mapping[str, Any]) -> None:
    """Writes export.json and gives the folder its name; an earlier export there goes."""
    write_bytes_atomic(candidate / RECORD, (json.dumps(dict(document), indent=1) + "\n").encode())
    shutil.rmtree(out, ignore_errors=True)
    candidate.replace(out)


def _convert(
    source: Source, kind: Export, names: list[str], dtype: torch.dtype | None, own: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a shard as the target stores them."""
    tensors: dict[str, Tensor] = {}
    for name in names:
        module = source.owner(name)
        if module is None:
            tensor = source.weights.read(name)
            tensors[name] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        elif kind.encode is None:
            tensors[f"{module}.weight"] = source.plain(module).to(dtype or own)
        elif f"{module}.weight" not in tensors and f"{module}.weight_packed" not in tensors:
            form, value = source.value(module)
            tensors |= {f"{module}.{part}": t for part, t in kind.encode(form, value, dtype or own).items()}
    return tensors


def _config(source: Source, kind: Export, dtype: torch.dtype | None, own: torch.dtype) -> dict[str, Any]:
    config = {key: value for key, value in source.headers.config.items() if key != "quantization_config"}
    if kind.config is not None and source.headers.packed:
        config["quantization_config"] = kind.config(source, dtype or own)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    return config


def _version_of(package: str | None) -> dict[str, str]:
    return {} if package is None else {package.replace("_", "-"): importlib.metadata.version(package)}
