"""What transformers calls while `AutoModelForCausalLM.from_pretrained` loads a packed checkpoint.

1. The model stands on the meta device: each module that config.json lists is swapped for a `PackedLinear`.
2. transformers reads the flat tensors into them; these stay as stored, whatever `dtype` was asked for.
3. Module after module is repacked for that `dtype` and for the device that it landed on.

A process that did not import circuitpress finds 1-D bytes where it expects a matrix, and transformers raises: it does
not go on with random weights, as it would if the tensors had other names.
"""

from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CheckpointError, CircuitpressError
from .descriptor import Descriptor
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
        for name, entry in self.quantization_config.modules.items():
            descriptor = Descriptor.from_json(name, entry)
            bias = getattr(_find(model, name), "bias", None) is not None
            model.set_submodule(name, PackedLinear(descriptor, bias=bias, dtype=self.compute_dtype, device="meta"))
        return model

    def _process_model_after_weight_loading(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: nn.Module, **kwargs: Any
    ) -> nn.Module:
        del kwargs
        for name, module in packed_linears(model).items():
            for tensor, buffer in module.stored.items():
                if buffer.is_meta:
                    raise CircuitpressError(f"{name} was sent to disk", hint="pass a device_map without 'disk'")
                # transformers only warns of a missing tensor and leaves its memory as it was; it marks what it loads.
                if not getattr(buffer, "_is_hf_initialized", False):
                    message = f"{name}.{tensor} is missing from the weight files"
                    raise CheckpointError(message, hint="copy or download the folder again")
            module.repack(self.compute_dtype)
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


def _find(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(
            f"config.json lists the packed module {name}, but {type(model).__name__} has none of that name",
            hint="load the folder with the class that its config.json names, through AutoModelForCausalLM",
        ) from None
