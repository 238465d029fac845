"""What transformers calls while `AutoModelForCausalLM.from_pretrained` loads a packed checkpoint.

1. The model stands on the meta device: each module that config.json lists is swapped for a `PackedLinear` or a
   `PackedEmbedding`; an lm_head tied to that becomes a `PackedLinear` that shares its tensors.
2. transformers reads the flat tensors into them; these stay as stored, whatever `dtype` was asked for.
3. Module after module is repacked for that `dtype` and for the device that it landed on; on a GPU layers are fused.

A process that did not import circuitpress finds 1-D bytes where it expects a matrix, and transformers raises: it does
not go on with random weights, as it would if the tensors had other names.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CheckpointError, CircuitpressError
from .descriptor import Descriptor
from .embedding import PackedEmbedding, packed_embeddings, share, tied_head
from .fusion import can_fuse, fuse_layers
from .linear import PackedLinear, packed_linears

METHOD = "circuitpress"
VERSION = 1


class CircuitpressConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json: the descriptor of every packed module, see `descriptor.Descriptor`."""

    def __init__(self, modules: dict[str, Any] | None = None, version: int = VERSION, **_: Any) -> None:
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]
        self.modules = modules or {}
        self.version = version


class CircuitpressQuantizer(HfQuantizer):
    """Loads packed checkpoints; it cannot pack a dense model on the fly (`circuitpress run` does that)."""

    requires_calibration = True
    quantization_config: CircuitpressConfig
    compute_dtype: torch.dtype = torch.float32
    tied: dict[str, str]

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """CheckpointError if the checkpoint was written by a later version."""
        del args, kwargs
        if self.quantization_config.version > VERSION:
            message = f"the checkpoint has format version {self.quantization_config.version}"
            raise CheckpointError(
                f"{message}, this circuitpress reads {VERSION}", hint="pip install --upgrade circuitpress"
            )

    def _process_model_before_weight_loading(
        self, model: nn.Module, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> nn.Module:
        del kwargs
        self.compute_dtype = dtype or torch.get_default_dtype()
        embedding, head = model.get_input_embeddings(), _tied_head_name(model)  # pyright: ignore
        self.tied = {}
        for name, entry in self.quantization_config.modules.items():
            descriptor, module = Descriptor.from_json(name, entry), _find(model, name)
            if isinstance(module, nn.Embedding):
                model.set_submodule(name, PackedEmbedding(descriptor, device="meta"))
                if module is embedding and head is not None and head not in self.quantization_config.modules:
                    model.set_submodule(head, tied_head(descriptor))
                    self.tied[head] = name
                continue
            bias = getattr(module, "bias", None) is not None
            model.set_submodule(name, PackedLinear(descriptor, bias=bias, dtype=self.compute_dtype, device="meta"))
        # There is one tensor now and nothing to tie; transformers would look for two.
        if self.tied:
            keys: dict[str, str] = model.all_tied_weights_keys  # pyright: ignore
            for target in [key for key in keys if key.rpartition(".")[0] in self.tied]:
                del keys[target]
        return model

    def _process_model_after_weight_loading(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: nn.Module, **kwargs: Any
    ) -> nn.Module:
        del kwargs
        linears, embeddings = packed_linears(model), packed_embeddings(model)
        for head, name in self.tied.items():
            _refuse_missing(name, embeddings[name].stored)
            share(embeddings[name], linears[head])
        for name, module in linears.items():
            _refuse_missing(name, module.stored)
        if can_fuse(model, self.compute_dtype):
            fuse_layers(model, self.compute_dtype)
        for module in packed_linears(model).values():
            if module.form == "stored":
                module.repack(self.compute_dtype)
        heads = {name: linears[head] for head, name in self.tied.items()}
        for name, module in embeddings.items():
            _refuse_missing(name, module.stored)
            module.repack(self.compute_dtype, head=heads.get(name))
        return model

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Raises: the weights in memory are repacked for this machine, the files they came from are the checkpoint."""
        raise CircuitpressError(
            "a packed model cannot be saved from memory, where its weights are laid out for this machine",
            hint="copy its folder instead: cp -r MODEL_DIR NEW_DIR",
        )

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """False: codes have no gradient."""
        return False


def _refuse_missing(name: str, tensors: Mapping[str, Tensor]) -> None:
    for tensor, buffer in tensors.items():
        if buffer.is_meta:
            raise CircuitpressError(f"{name} was sent to disk", hint="pass a device_map without 'disk'")
        # transformers only warns of a missing tensor and leaves its memory as it was; it marks what it loads.
        if not getattr(buffer, "_is_hf_initialized", False):
            message = f"{name}.{tensor} is missing from the weight files"
            raise CheckpointError(message, hint="copy or download the folder again")


def _tied_head_name(model: nn.Module) -> str | None:
    """The name of an lm_head that config.json ties to the embedding."""
    head = model.get_output_embeddings()  # pyright: ignore
    if head is None or not getattr(model.config, "tie_word_embeddings", False):
        return None
    return next(name for name, module in model.named_modules() if module is head)


def _find(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(
            f"config.json lists the packed module {name}, but {type(model).__name__} has none of that name",
            hint="load the folder with the class that its config.json names, through AutoModelForCausalLM",
        ) from None
