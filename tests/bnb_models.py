"""Models that bitsandbytes packed, with the logits that transformers computes from them: what `data/bnb` holds.

    python tests/bnb_models.py tests/data/bnb

writes them anew; it needs the extra `bnb`. The committed ones are by bitsandbytes 0.50.2 and transformers 5.23.0, on a
CPU. Widths are multiples of 64, since at others that version's own forward pass is wrong there.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4": ("llama", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "nf4-twice": ("llama", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
    "fp4-as-bfloat16": (
        "llama",
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16},
    ),
    "nf4-gpt2": ("gpt2", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "int8": ("llama", {"load_in_8bit": True}),
}
IDS = torch.arange(24).view(2, 12) * 5 % 16


def write(name: str, folder: Path) -> None:
    """Writes the case `name` into `folder`, and its logits [2, 12, 16] beside it as expected.safetensors."""
    import transformers

    family, options = CASES[name]
    dense = folder.with_name(f"{folder.name}-dense")
    torch.manual_seed(0)
    _model(family).save_pretrained(dense)
    config = transformers.BitsAndBytesConfig(**options)
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model = load(dense, quantization_config=config, device_map="cpu", dtype=torch.float32)
    model.save_pretrained(folder)
    # With gradients: where none flow, bitsandbytes computes in bfloat16 on a CPU that has instructions for that.
    # Its int8 layers round what they multiply with as well; transformers can take the weights out of them.
    model = model.dequantize(dtype=torch.float32) if name == "int8" else model
    logits = model.eval()(IDS).logits
    save_file({"logits": logits.detach().float().contiguous()}, folder / "expected.safetensors")
    for path in [*dense.iterdir(), folder / "generation_config.json"]:
        path.unlink()
    dense.rmdir()


def _model(family: str) -> Any:
    import transformers

    common: dict[str, Any] = {"vocab_size": 16, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_inner": 128, "n_positions": 16}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **common))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "max_position_embeddings": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **common))


if __name__ == "__main__":
    for case in CASES:
        write(case, Path(sys.argv[1]) / case)
