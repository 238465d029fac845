"""What the engine's tests compare with: the whole model in transformers, differentiated by torch.autograd.

Nothing here uses the library. Matrices are found as `nn.Linear` or `Conv1D` inside decoder blocks, gradients by hooks
on one ordinary forward pass, labels by inverting the cumulative softmax in numpy.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

MODELS = ("tiny_llama", "tiny_mistral", "tiny_qwen2", "tiny_qwen3", "tiny_gpt2")


def load(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """The model that transformers loads; `Any`, since each test pokes at its insides."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()


def blocks_of(model: Any) -> nn.ModuleList:
    """The decoder blocks."""
    return model.model.layers if hasattr(model, "model") else model.transformer.h


def linears(model: Any) -> dict[str, nn.Module]:
    """The linear maps inside decoder blocks, by full name."""
    from transformers.pytorch_utils import Conv1D

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and (".layers." in name or ".h." in name)
    }


def weight(module: nn.Module) -> Tensor:
    """[outputs, inputs], as a view that can be written to."""
    value = module.weight.data  # pyright: ignore
    assert isinstance(value, Tensor)
    return value if isinstance(module, nn.Linear) else value.T


def tokens(n: int, length: int, *, vocab: int = 97, seed: int = 0) -> Tensor:
    """Random token windows int64 [n, length]."""
    return torch.randint(vocab, (n, length), generator=torch.Generator().manual_seed(seed))


def draw_labels(logits: Tensor, *, seed: int = 0, draw: int = 0) -> Tensor:
    """Labels [n, length] of logits [n, length, vocab]: a stream of uniforms a sequence, put through the inverse CDF."""
    result = np.zeros(logits.shape[:2], dtype=np.int64)
    for n, rows in enumerate(logits.double().softmax(-1).numpy()):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + n) * 1009 + draw)
        uniform = torch.rand(logits.shape[1], generator=generator, dtype=torch.float64).numpy()
        for t, (p, u) in enumerate(zip(rows, uniform, strict=True)):
            result[n, t] = np.searchsorted(p.cumsum(), u * p.sum())
    return torch.from_numpy(result)


@dataclass
class Trace:
    """One forward and backward pass: logits [n, t, v]; by linear its input and the gradient at its output; by block the
    gradient at its input. All of the sum of token losses."""

    logits: Tensor
    x: dict[str, Tensor]
    g: dict[str, Tensor]
    inputs: list[Tensor]
    pulled: list[Tensor]


def trace(model: Any, ids: Tensor, labels: Tensor) -> Trace:
    """Runs all windows at once through the whole model and differentiates the sum of their losses on `labels`."""
    x: dict[str, Tensor] = {}
    y: dict[str, Tensor] = {}
    hidden: list[Tensor] = []

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x[name] = args[0].detach()
            output.retain_grad()
            y[name] = output

        return hook

    def before(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        state = args[0] if args else kwargs["hidden_states"]
        state.retain_grad()
        hidden.append(state)

    handles = [module.register_forward_hook(keep(name)) for name, module in linears(model).items()]
    handles += [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks_of(model)]
    logits = model(ids, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    grads = {name: _gradient(output) for name, output in y.items()}
    return Trace(logits.detach(), x, grads, [h.detach() for h in hidden], [_gradient(h) for h in hidden])


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || logits) of every position, in float64."""
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def rewrite(folder: Path, out: Path, *, change: Any = None, **config: Any) -> Path:
    """Copies a checkpoint of one file: `change(state)` edits its tensors in place, `config` its config.json."""
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(folder, out)
    state = load_file(out / "model.safetensors")
    if change is not None:
        change(state)
    whole = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(whole, out / "model.safetensors", {"format": "pt"})
    document = json.loads((out / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps(document))
    return out
