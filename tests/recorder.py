"""Watches what pricing hands to the rounding, so that a reference can price the very same weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import circuitpress.price as pricing
from circuitpress.quantize import Quantized


@dataclass
class Recorder:
    """Keeps what pricing passes to the rounding and gets from it: (Hessian, decoded weights by format) by call."""

    calls: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = pricing.quantize_everywhere

        def record(weight: Tensor, hessian: Tensor, formats: Sequence[str]) -> tuple[dict[str, Quantized], str]:
            result, note = real(weight, hessian, formats)
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
