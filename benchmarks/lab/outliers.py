"""Makes a checkpoint hard to quantize without changing its function: what large models do to quantizers, made small.

Large models have a few hidden channels whose activations are tens of times larger than the rest (Dettmers et al. 2022,
https://arxiv.org/abs/2208.07339), weights of very different size side by side, and single weights in an early `down`
that are far larger than all others and that the model cannot do without (Yu et al. 2024,
https://arxiv.org/abs/2411.07191). Small ones have none of that, so methods that would fail at scale look well on them.
All three are put in by scales that cancel:

1. Outlier channels: a few entries of every norm gain are multiplied by 2^k, and the matching columns of the matrices
   that read the norm (q, k, v; gate, up) divided by it. The same channels in every block, as in real models.
2. Uneven scales: rows of v against columns of o, and rows of up against columns of down, by random powers of two.
3. A super weight: in an early block, the neuron whose largest weight in `down` stands out most gets that column scaled
   until the weight is `peak` times the matrix's standard deviation, and its row of `up` is scaled down as much.

Every scale is a power of two, so bfloat16 weights stay exact and logits differ by float32 rounding only.

  python benchmarks/lab/outliers.py CHECKPOINT --out DIR
"""

import argparse
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from circuitpress.anatomy import Anatomy, Block, family_of, read_anatomy
from circuitpress.checkpoint import Weights, read_headers
from circuitpress.files import atomic, write_bytes_atomic


@dataclass(frozen=True)
class Injection:
    """How strong the outliers are.

    `channels` hidden channels get activations 2^`boost` times as large; rows and columns of v, o, up and down are
    scaled by powers of two up to 2^`spread`; the super weight sits in block `block` and is `peak` standard deviations.
    """

    channels: int = 6
    boost: int = 5
    spread: int = 2
    block: int = 1
    peak: float = 64.0
    seed: int = 0


def inject(tensors: dict[str, Tensor], anatomy: Anatomy, how: Injection) -> dict[str, Tensor]:
    """The tensors of a checkpoint (by their name in the model) with outliers of equal function; see the module's text.

    Raises ValueError for a family without gated MLPs, and if a scale would not be exact in the checkpoint's type.
    """
    if {"gate", "up", "down"} - {matrix.role for matrix in anatomy.blocks[0].matrices}:
        raise ValueError(f"{anatomy.model_type}: outliers are injected into models with gate, up and down only")
    out = {name: tensor.clone() for name, tensor in tensors.items()}
    draw = torch.Generator().manual_seed(how.seed)
    channels = torch.randperm(anatomy.hidden, generator=draw)[: how.channels]
    for block in anatomy.blocks:
        for norm, roles in (("input_layernorm", ("q", "k", "v")), ("post_attention_layernorm", ("gate", "up"))):
            scale = torch.ones(anatomy.hidden)
            scale[channels] = 2.0**how.boost
            _scale(out, f"{block.prefix}.{norm}.weight", scale)
            for role in roles:
                _scale(out, _weight(block, role), 1 / scale)
        powers = torch.randint(-how.spread, how.spread + 1, (block.kv_heads, block.head_dim), generator=draw)
        value = 2.0**powers
        _scale(out, _weight(block, "v"), value.reshape(-1, 1))
        _scale(out, _bias(block, "v"), value.reshape(-1))
        # Query head h reads value head h // (heads / kv_heads).
        _scale(out, _weight(block, "o"), 1 / value.repeat_interleave(block.heads // block.kv_heads, 0).reshape(-1))
        _scale_neurons(out, block, 2.0 ** torch.randint(-how.spread, how.spread + 1, (block.neurons,), generator=draw))
    chosen = anatomy.blocks[min(how.block, len(anatomy.blocks) - 1)]
    down = out[_weight(chosen, "down")].float()
    tops = down.abs().amax(0)
    neuron = int((tops / down.square().mean(0).sqrt().clamp(min=1e-30)).argmax())
    lift = torch.ones(chosen.neurons)
    lift[neuron] = 2.0 ** float((how.peak * down.std() / tops[neuron]).log2().ceil().clamp(min=0))
    _scale_neurons(out, chosen, 1 / lift)
    return out


def kurtosis(values: Tensor) -> float:
    """E[x^4] / E[x^2]^2 of all entries: 3 for a normal distribution, more with outliers."""
    x = values.double().flatten()
    return float(x.pow(4).mean() / x.square().mean().square())


def write(checkpoint: Path, out: Path, how: Injection) -> Path:
    """Writes the variant of `checkpoint` to the folder `out`; what was done is recorded in outliers.json."""
    anatomy = read_anatomy(checkpoint)
    headers = read_headers(checkpoint)
    weights = Weights(headers, family_of(headers.config).prefix)
    names = [weights.model_name(stored) for stored in headers.tensors]
    tensors = inject({name: weights.read(name) for name in names}, anatomy, how)
    out.mkdir(parents=True, exist_ok=True)
    with atomic(out / "model.safetensors") as path:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    carried = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "*SOURCES.md")
    for pattern in carried:
        for file in checkpoint.glob(pattern):
            shutil.copyfile(file, out / file.name)
    record = asdict(how) | {"of": checkpoint.resolve().name}
    write_bytes_atomic(out / "outliers.json", (json.dumps(record, indent=1) + "\n").encode())
    return out


def _scale_neurons(tensors: dict[str, Tensor], block: Block, scale: Tensor) -> None:
    """Multiplies the rows of up by `scale` [neurons] and divides the columns of down by it."""
    _scale(tensors, _weight(block, "up"), scale[:, None])
    _scale(tensors, _bias(block, "up"), scale)
    _scale(tensors, _weight(block, "down"), 1 / scale)


def _scale(tensors: dict[str, Tensor], name: str, scale: Tensor) -> None:
    """Multiplies one tensor in place; ValueError where that cannot be undone exactly."""
    if name not in tensors:
        return
    before = tensors[name]
    after = before * scale.to(before.dtype)
    if not torch.equal(after / scale.to(before.dtype), before):
        raise ValueError(f"{name}: scaling leaves the range of {before.dtype}")
    tensors[name] = after


def _weight(block: Block, role: str) -> str:
    return f"{block.role(role).module}.weight"


def _bias(block: Block, role: str) -> str:
    return f"{block.role(role).module}.bias"


def main() -> None:
    """Reads the command line and writes the variant."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    for name, default in asdict(Injection()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = vars(parser.parse_args())
    write(options.pop("checkpoint"), options.pop("out"), Injection(**options))


if __name__ == "__main__":
    main()
