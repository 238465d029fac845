"""Run as a script in a fresh process: loads an exported folder with what everybody has, and writes its logits.

    python -I stranger.py FOLDER REQUEST.safetensors ANSWER.safetensors

Nothing of circuitpress can be imported here, whatever is installed: what loads now loads elsewhere. All arithmetic is
in float32, so that a difference is one of weights: bitsandbytes would otherwise compute in 16 bits on some CPUs where
no gradient flows, and its int8 layers round what they multiply with (then "logits_as_is" holds what they come to).
"""

import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any


class _Refuse(MetaPathFinder):
    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        del path, target
        if fullname.split(".")[0] in ("circuitpress", "circuitpress_kernels"):
            raise ImportError(f"{fullname} must not be needed")


def answer(folder: Path, request: Path, out: Path) -> None:
    """Logits float32 [n, length, vocab] for the token ids of `request`, with what was loaded in the metadata."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    ids = load_file(request)["ids"]
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(folder, dtype=torch.float32, output_loading_info=True)
    model.eval()
    faults = {
        key: sorted(map(str, info.get(key) or ())) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    method = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    tensors = {}
    for parameter in model.parameters():  # bitsandbytes leaves them as they were stored, whatever was asked for
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in model.modules():
        if hasattr(module, "compute_dtype") and hasattr(getattr(module, "weight", None), "quant_state"):
            module.compute_dtype = module.weight.quant_state.dtype = torch.float32
    if method.get("load_in_8bit"):
        with torch.no_grad():
            tensors["logits_as_is"] = model(ids).logits.float()
        model = model.dequantize(dtype=torch.float32)
    model.get_input_embeddings().weight.requires_grad_(True)
    tensors["logits"] = torch.cat([model(row[None]).logits.detach().float() for row in ids])
    ours = [name for name in sys.modules if name.split(".")[0] in ("circuitpress", "circuitpress_kernels")]
    facts = {"faults": faults, "ours": ours, "class": type(model).__name__, "transformers": transformers.__version__}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, out, metadata={"facts": json.dumps(facts)}
    )


if __name__ == "__main__":
    sys.meta_path.insert(0, _Refuse())
    answer(*(Path(argument) for argument in sys.argv[1:4]))
