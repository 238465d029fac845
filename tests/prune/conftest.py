"""Units to keep, for tests of pruning."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from circuitpress.anatomy import read_anatomy

Keep = dict[int, dict[str, np.ndarray]]


@pytest.fixture(scope="session")
def keep_some() -> Callable[..., Keep]:
    """`keep_some(folder, neurons, kv_groups)`: other units in every layer."""

    def keep(folder: Path, neurons: int, kv_groups: int) -> Keep:
        draw = np.random.default_rng(0)
        return {
            block.index: {
                "neuron": np.sort(draw.permutation(block.neurons)[:neurons]),
                "kv_group": np.sort(draw.permutation(block.kv_heads)[:kv_groups]),
            }
            for block in read_anatomy(folder).blocks
        }

    return keep
