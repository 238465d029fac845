"""Writes the compressed model: one forward walk, one atomic shard a block, then one rename.

1. Everything outside the blocks becomes the first shard: embedding and lm_head as the plan says, the rest unchanged.
2. For every block: rebuild the Hessians (rounding.py) or measure them behind the rounded prefix (prefix.py), quantize
   by plan, pack, and write the block's tensors as one shard, in a folder named by the digest of the plan. A rerun keeps
   the shards of its plan and only walks through their blocks; those of other plans are removed.
3. Shards, index, config and tokenizer are collected in a partial folder that is renamed when it is whole.

Equal inputs give equal bytes: nothing in a shard depends on time, on the machine's name or on how often it was resumed.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from .anatomy import Block, Matrix, family_of
from .assemble import METADATA, assemble, outer_tensors
from .checkpoint import METHOD, Headers, Weights, read_headers
from .console import Advance, ignore
from .errors import CircuitpressError
from .files import write_bytes_atomic
from .formats import CastFormat, Format, decode_segments, pack_segments, parse
from .lean import Lean, pulls
from .outer import load_hessian, round_outer
from .prefix import Beside, Prefix
from .price import permute_neurons
from .quantize import Quantized
from .rounding import block_hessians, context, in_own_order, round_block, segments_by_module
from .stream import Stream, forward
from .units import Plan

VERSION = 1
"""The version of the packed checkpoint format in `quantization_config`."""


def apply(
    stream: Stream, plan: Plan, windows: Tensor, *, saliency: Path, shards: Path, out: Path, polish: bool = True,
    correct: bool = False, beside: Beside = (), leans: Sequence[Lean] = (), advance: Advance = ignore,
) -> None:  # fmt: skip
    """Writes the model of `plan` to the folder `out`.

    `windows` are the calibration tokens that were priced, `saliency` the folder of the price shards, `shards` the place
    for the blocks that are already done. `polish` improves codes after rounding (`quantize/polish.py`), `correct`
    rounds for the inputs behind the model's own rounded prefix (`prefix.py`, which says what `beside` is), `leans` are
    what behaviors pull (`lean.py`). Raises CircuitpressError when a file cannot be written.
    """
    shards = _shard_folder(shards, plan, polish=polish, correct=correct, leans=leans)
    layout = segments_by_module(plan.decisions)
    batches = stream.batches(windows if correct else context(windows, saliency))
    headers = read_headers(stream.anatomy.folder)
    family = family_of(headers.config)
    weights = Weights(headers, family.prefix)
    modules = _descriptors(stream.anatomy.outer, segments_by_module(plan.outer))
    for block in stream.anatomy.blocks:
        modules |= _descriptors(block.matrices, layout)

    _write_outer(headers, stream, plan, saliency, shards)
    store, states = stream.store("apply"), stream.store("prefix")
    prefix = None
    if correct:
        with stream.outer(_decoded(_shard(shards, None), stream.anatomy.outer, modules)):
            prefix = Prefix(stream, batches, states, saliency, beside)

    def visit(index: int, module: nn.Module, inputs: Callable[[int], Tensor]) -> None:
        path, place = _shard(shards, index), stream.anatomy.blocks[index]
        order = torch.tensor(plan.neuron_order[index]) if index in plan.neuron_order else None
        if not path.exists():
            pulled = pulls(leans, place, stream.device)
            if prefix is not None:
                rounded = prefix.round(module, place, inputs, layout, order, polish=polish, pulled=pulled)
            else:
                hessians = block_hessians(stream, module, place, inputs, len(batches), saliency)
                rounded = round_block(module, place, layout, hessians, order, polish=polish, pulled=pulled)
            tensors = _block_tensors(weights, headers, place, rounded, modules, order)
            write_bytes_atomic(path, save(tensors, metadata=METADATA))
        if prefix is not None:
            found = in_own_order(_decoded(path, place.matrices, modules), place, order)
            prefix.follow(module, place, {name: weight.to(stream.device) for name, weight in found.items()})

    try:
        forward(stream, batches, store, visit=visit, advance=advance)
    finally:
        store.clear()
        states.clear()
    _collect(headers, stream, modules, shards, out)


def _shard(shards: Path, index: int | None) -> Path:
    return shards / ("outer.safetensors" if index is None else f"block-{index:05d}.safetensors")


def _decoded(shard: Path, matrices: Sequence[Matrix], modules: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights [rows, cols], as they will be, of those of `matrices` that a shard holds, by module name."""
    found = {}
    tensors = load_file(shard)
    for matrix in matrices:
        if (entry := modules.get(matrix.module)) is not None:
            packed = {
                name.rpartition(".")[2]: t for name, t in tensors.items() if name.rpartition(".")[0] == matrix.module
            }
            packed.pop("bias", None)
            found[matrix.module] = decode_segments(packed, entry["shape"], entry["axis"], entry["segments"])
        elif (weight := tensors.get(f"{matrix.module}.weight")) is not None:
            found[matrix.module] = weight.T if matrix.transposed else weight
    return found


def _shard_folder(shards: Path, plan: Plan, *, polish: bool, correct: bool, leans: Sequence[Lean]) -> Path:
    """The folder for this plan's shards; the others' are removed."""
    pulled = [[lean.folder.parent.name, lean.nats, lean.halves] for lean in leans]
    rounded = {"polish": polish, "correct": correct, "leans": pulled}
    content = json.dumps(plan.to_json() | rounded, sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    for other in shards.glob("*"):
        if other.name != digest:
            shutil.rmtree(other, ignore_errors=True)
    return shards / digest


def _descriptors(
    matrices: Sequence[Matrix], layout: dict[str, tuple[str, list[tuple[str, int, int]]]]
) -> dict[str, Any]:
    """The entries of `quantization_config.modules`; a matrix without packed segments stays an ordinary weight."""
    result = {}
    for matrix in matrices:
        if matrix.module not in layout:  # embedding or lm_head of a plan that does not speak of them
            continue
        axis, segments = layout[matrix.module]
        floating = {form for form, _, _ in segments if isinstance(parse(form), CastFormat)}
        if len(floating) > 1:
            types = " and ".join(sorted(floating))
            message = f"the plan gives parts of {matrix.module} the types {types}: a matrix holds one"
            raise CircuitpressError(message, hint="keep one floating-point type in plan.formats")
        if all(isinstance(parse(form), CastFormat) for form, _, _ in segments):
            continue
        entries = [{"format": form, "start": start, "stop": stop} for form, start, stop in segments]
        result[matrix.module] = {"shape": [matrix.rows, matrix.cols], "axis": axis, "segments": entries}
    return result


def _block_tensors(
    weights: Weights, headers: Headers, place: Block, rounded: dict[str, Quantized], modules: dict[str, Any],
    order: Tensor | None,
) -> dict[str, Tensor]:  # fmt: skip
    """Everything that the block stores: packed matrices, the others as they were (neurons permuted), norms, biases."""
    tensors: dict[str, Tensor] = {}
    matrices = {matrix.module: matrix for matrix in place.matrices}
    for stored in headers.tensors:
        name = weights.model_name(stored)
        if not name.startswith(place.prefix + "."):
            continue
        module, _, part = name.rpartition(".")
        matrix = matrices.get(module)
        if matrix is None or part == "bias":
            tensor = weights.read(name)
            if matrix is not None and order is not None and matrix.role in ("gate", "up"):
                tensor = tensor[order].contiguous()
            tensors[name] = tensor
        elif module in modules:
            packed = pack_segments(_parts(weights, matrix, rounded[module], order))
            tensors |= {f"{module}.{key}": value.cpu() for key, value in packed.items()}
        else:
            values = [value for _, value in _parts(weights, matrix, rounded[module], order)]
            tensor = torch.cat(values, 0 if rounded[module].axis == "rows" else 1)
            tensors[name] = (tensor.T if matrix.transposed else tensor).contiguous().cpu()
    return tensors


def _parts(weights: Weights, matrix: Matrix, rounded: Quantized, order: Tensor | None) -> list[tuple[Format, Any]]:
    """The segments as they are stored; floating-point ones come from the checkpoint, not through the compute type."""
    if not any(isinstance(form, CastFormat) for form, *_ in rounded.parts):
        return [(form, value) for form, _, _, value in rounded.parts]
    original = weights.read(f"{matrix.module}.weight")
    original = original.T if matrix.transposed else original
    if order is not None:
        original = permute_neurons(matrix.role, original, order)
    result: list[tuple[Format, Any]] = []
    for form, start, stop, value in rounded.parts:
        if isinstance(form, CastFormat):
            value = original.narrow(0 if rounded.axis == "rows" else 1, start, stop - start).to(form.dtype)
        result.append((form, value))
    return result


def _write_outer(headers: Headers, stream: Stream, plan: Plan, saliency: Path, shards: Path) -> None:
    path = _shard(shards, None)
    if path.exists():
        return
    weights = Weights(headers, family_of(headers.config).prefix)
    tensors = outer_tensors(headers, weights, stream.anatomy)
    for decision in plan.outer:
        module, form = decision.group.name, parse(decision.format)
        original = tensors.pop(f"{module}.weight")
        if isinstance(form, CastFormat):
            tensors[f"{module}.weight"] = original.to(form.dtype)
            continue
        hessian = load_hessian(saliency, module).to(stream.device)
        rounded = round_outer(stream.outer_weight(module), hessian, decision.format)
        packed = pack_segments([(kind, value) for kind, _, _, value in rounded.parts])
        tensors |= {f"{module}.{key}": value.cpu() for key, value in packed.items()}
    write_bytes_atomic(path, save(tensors, metadata=METADATA))


def _collect(headers: Headers, stream: Stream, modules: dict[str, Any], shards: Path, out: Path) -> None:
    """Builds the model folder beside `out` and renames it; the previous folder, if any, is replaced."""
    config = dict(headers.config)
    if modules:
        config["quantization_config"] = {"quant_method": METHOD, "version": VERSION, "modules": modules}
    sources = [_shard(shards, None), *(_shard(shards, block.index) for block in stream.anatomy.blocks)]
    assemble(headers.folder, config, sources, out)
