"""Made-up price tables, and the planner's answers by trying everything."""

import itertools
from collections.abc import Sequence

import numpy as np

from circuitpress.plan import Constraint
from circuitpress.units import Group, Prices, Segment, UnitId

FORMATS = ("int2g64", "int3g64", "int4g64", "int8g64", "bfloat16")
BITS = {"int2g64": 2.28, "int3g64": 3.3, "int4g64": 4.31, "int8g64": 8.38, "bfloat16": 16.0}


def make_prices(seed: int, groups: int, *, formats: Sequence[str] = FORMATS, per_layer: int = 3) -> Prices:
    """Prices that look like real ones: nats fall by about 4 a bit, with noise that breaks the order now and then."""
    draw = np.random.default_rng(seed)
    table = []
    for i in range(groups):
        layer, place = divmod(i, per_layer)
        module = f"model.layers.{layer}.{('self_attn.q_proj', 'mlp.up_proj', 'mlp.down_proj')[place]}"
        rows, cols = int(draw.integers(5, 60)), int(draw.integers(5, 60))
        units = (UnitId(layer, "head", 0), UnitId(layer, "head", 1)) if place == 0 else ()
        table.append(Group(module, layer, (Segment(module, "rows", 0, rows, rows, cols),), units))
    numel = np.array([group.numel for group in table])
    bits = np.array([BITS[name] for name in formats])
    nats = draw.lognormal(-6, 1.5, (groups, 1)) * 4.0 ** (4 - bits) * draw.lognormal(0, 0.6, (groups, len(formats)))
    nats[:, bits == 16] = 0
    nbytes = np.ceil(numel[:, None] * bits / 8).astype(np.int64)
    return Prices(tuple(table), tuple(formats), nbytes, nats, nats * 1.1, nats / 10)


def replaced(prices: Prices, nats: np.ndarray) -> Prices:
    """The same table with other prices."""
    return Prices(prices.groups, prices.formats, prices.nbytes, nats, nats, np.zeros_like(nats))


def brute_force(prices: Prices, constraints: Sequence[Constraint]) -> float:
    """The least total price over every possible plan; infinite if there is none."""
    nats = np.where(np.isfinite(prices.nats), prices.nats.clip(min=0), np.inf)
    for rule in constraints:
        if rule.allowed is not None:
            nats = np.where(rule.allowed, nats, np.inf)
    n, f = nats.shape
    plans = np.array(list(itertools.product(range(f), repeat=n)))
    total = nats[np.arange(n), plans].sum(1)
    for rule in constraints:
        if rule.weights is not None and rule.cap is not None:
            total[rule.weights[np.arange(n), plans].sum(1) > rule.cap] = np.inf
    return float(total.min())
