"""Watches what pricing hands to the rounding, so that a reference can price the very same weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import circuitpress.price as pricing
from circuitpress.quantize import Quantized
from circuitpress.units import Prices


@dataclass
class Recorder:
    """Keeps what pricing passes to the rounding and gets from it: (Hessian, decoded weights by format) by call."""

    calls: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = pricing.quantize_everywhere

        def record(
            weight: Tensor, hessian: Tensor, formats: Sequence[str], **options: bool
        ) -> tuple[dict[str, Quantized], str]:
            result, note = real(weight, hessian, formats, **options)
            decoded = {name: value.decode().double() for name, value in result.items()}
            self.calls.append((weight.double(), hessian.double(), decoded))
            return result, note

        monkeypatch.setattr(pricing, "quantize_everywhere", record)

    def find(self, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The call that rounded this matrix [rows, cols]."""
        found = [
            call for call in self.calls if call[0].shape == weight.shape and torch.allclose(call[0], weight.double())
        ]
        assert len(found) == 1
        return found[0][1], found[0][2]


class NeuronOrder:
    """Puts the neurons of one matrix into the order of the prices, and back."""

    def __init__(self, prices: Prices, layer: int, module: str) -> None:
        neurons = {"gate_proj": 0, "up_proj": 0, "c_fc": 0, "down_proj": 1}
        self.dim = 1 if module.endswith("mlp.c_proj") else neurons.get(module.rsplit(".", 1)[1])
        self.order = torch.from_numpy(prices.neuron_order[layer]) if layer in prices.neuron_order else None

    def apply(self, matrix: Tensor) -> Tensor:
        """The matrix as it was rounded."""
        return matrix if self.order is None or self.dim is None else matrix.index_select(self.dim, self.order)

    def undo(self, matrix: Tensor) -> Tensor:
        """The inverse of `apply`."""
        if self.order is None or self.dim is None:
            return matrix
        return torch.zeros_like(matrix).index_copy_(self.dim, self.order, matrix)
