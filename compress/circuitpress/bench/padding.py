"""A copy of a checkpoint with more neurons, all of them zero: the same function in widths that every peer accepts.

Most peers refuse, or leave at 16 bits, a matrix whose side is no multiple of 32. Rows of zeros in
gate and up and columns of zeros in down add exactly nothing to the block's output. The padded weights are stored by
the peer and counted; the judge cuts them off, which needs the padded rows of `up` to have stayed zero.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..anatomy import Anatomy, Block, Matrix, family_of
from ..checkpoint import Weights, read_headers
from ..files import atomic, write_bytes_atomic


def neurons_to_pad(anatomy: Anatomy, multiple: int) -> int:
    """How many neurons each block gets: what is missing to the next multiple, or 0 if padding is not possible."""
    widths = {block.neurons for block in anatomy.blocks}
    gated = all({"gate", "up", "down"} <= {matrix.role for matrix in block.matrices} for block in anatomy.blocks)
    if len(widths) != 1 or not gated:
        return 0
    return -widths.pop() % multiple


def padded_shape(matrix: Matrix, extra: int) -> tuple[int, int]:
    """The shape of a matrix once its block has `extra` more neurons."""
    rows = extra if matrix.role in ("gate", "up") else 0
    cols = extra if matrix.role == "down" else 0
    return matrix.rows + rows, matrix.cols + cols


def write_padded(anatomy: Anatomy, extra: int, out: Path) -> Path:
    """Writes the checkpoint with `extra` zero neurons in every block to the folder `out`; a whole one is kept."""
    if (out / "config.json").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    headers = read_headers(anatomy.folder)
    weights = Weights(headers, family_of(headers.config).prefix)
    roles = {f"{m.module}.weight": m for block in anatomy.blocks for m in block.matrices}
    tensors = {}
    for stored in headers.tensors:
        name = weights.model_name(stored)
        tensor = weights.read(name)
        if name in roles:
            shape = padded_shape(roles[name], extra)
            wider = torch.zeros(shape, dtype=tensor.dtype)
            wider[: tensor.shape[0], : tensor.shape[1]] = tensor
            tensor = wider
        elif name.endswith(("gate_proj.bias", "up_proj.bias")):
            tensor = torch.nn.functional.pad(tensor, (0, extra))
        tensors[name] = tensor.contiguous()
    with atomic(out / "model.safetensors") as path:
        save_file(tensors, path, metadata={"format": "pt"})
    for file in anatomy.folder.glob("*.json"):
        if file.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copyfile(file, out / file.name)
    for file in anatomy.folder.glob("*.model"):
        shutil.copyfile(file, out / file.name)
    config = dict(headers.config) | {"intermediate_size": anatomy.blocks[0].neurons + extra}
    write_bytes_atomic(out / "config.json", (json.dumps(config, indent=1) + "\n").encode())
    return out


def padding_is_silent(block: Block, weights: dict[str, torch.Tensor]) -> bool:
    """Whether the padded neurons of a peer's decoded weights add nothing, whatever their inputs: gate(x) x 0 = 0.

    `weights` maps module names to [rows, cols]; a matrix that the peer did not change is not in it.
    """
    neurons = block.neurons
    up, down = (weights.get(block.role(role).module) for role in ("up", "down"))
    return up is None or not bool(up[neurons:].any()) or (down is not None and not bool(down[:, neurons:].any()))
