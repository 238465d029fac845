"""A made-up run folder: every file that a run writes, with invented numbers that look like real ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from circuitpress.plan import Curve, make_plan, pareto, thin
from circuitpress.units import Group, Prices, Probe, Scores, Segment, UnitId

FORMATS = ("int2g64", "int3g64", "int4g64", "int8g64", "bfloat16")
BITS = np.array([2.28, 3.3, 4.31, 8.38, 16.0])
ROLES = {"q": (48, 48), "k": (16, 48), "v": (16, 48), "o": (48, 48)}
ROLES |= {"gate": (132, 48), "up": (132, 48), "down": (48, 132)}


def write_run(
    folder: Path, *, blocks: int = 5, heads: int = 6, neurons: int = 132, scale: int = 1, cut: bool = False
) -> Path:
    """Writes a whole run folder with `blocks` blocks; `cut` splits the first q matrix around a protected head."""
    draw = np.random.default_rng(7)
    groups = _groups(blocks, scale, cut)
    numel = np.array([group.numel for group in groups])
    depth = np.array([abs(group.layer - blocks / 3) for group in groups])
    nats = draw.lognormal(-6.5, 0.9, (len(groups), 1)) * np.exp(-depth[:, None] / blocks) * 4.2 ** (4 - BITS)
    nats *= draw.lognormal(0, 0.2, nats.shape) * 7 * 5 / len(groups)
    nats[:, -1] = 0
    nbytes = np.ceil(numel[:, None] * BITS / 8).astype(np.int64)
    prices = Prices(groups, FORMATS, nbytes, nats, nats * 1.05, nats / 20)
    probes = [
        Probe(name, float(BITS[i]), float(nats[:, i].sum()), float(nats[:, i].sum() * ratio))
        for i, (name, ratio) in enumerate((("int2", 0.62), ("int3", 0.94), ("int4", 1.03)))
    ]
    curve = Curve.fit(probes)
    other = 2 * 4096 * 48 * scale**2
    protect = ["L0.head.2"] if cut else ["model.layers.1.self_attn.k_proj"]
    plan = make_plan(prices, budget="3.0bpw", other_bytes=other, protect=protect, curve=curve)
    folder.mkdir(parents=True)
    prices.save(folder / "prices.safetensors")
    plan.save(folder / "plan.json")
    units, values = _scores(blocks, heads, neurons, draw)
    Scores("fisher", "gradient", units, values, values / 10).save(folder / "scores.safetensors")
    original = 2 * int(numel.sum())
    documents = {
        "anatomy.json": _anatomy(blocks, heads, neurons, scale, original, other),
        "probes.json": [vars(probe) for probe in probes],
        "pareto.json": [point.to_json() for point in thin(pareto(prices, curve=curve))],
        "exact.json": _exact(prices, draw),
        "manifest.json": {
            "program": "circuitpress",
            "version": "0.1.0",
            "fingerprints": {"weights.model.safetensors": "ab" * 32, "text.data.test": None, "recipe.data.seed": 0},
            "journal": {"score": 13.25, "plan": 0.1, "apply": 301.0},
        },
        "evaluate/fidelity.json": {
            "perplexity": 14.022, "reference_perplexity": 13.471, "kl": 0.0412, "kl_stderr": 0.00087,
            "top1_agreement": 0.9134, "bytes": plan.linear_bytes + other + 4000, "reference_bytes": original + other,
            "linear_bytes": plan.linear_bytes, "bits_per_weight": plan.bits_per_weight, "tokens": 32704, "seconds": 9.0,
        },
    }  # fmt: skip
    for name, document in documents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(document))
    (folder / "recipe.yaml").write_text(
        "schema: 1\nmodel: some-lab/little-llama\ndata:\n  calibration: /texts/<stories>.txt\n"
        "  samples: 128\n  length: 512\nplan:\n  budget: 3.0bpw\n"
    )
    return folder


def write_audited(nbytes: int) -> dict[str, Any]:
    """What audit.json holds, for a model whose files have `nbytes` bytes, with something in every section."""
    side = {"faithfulness": {"value": 0.97, "low": 0.91, "high": 1.02}, "left": 0.04, "whole": 6.5, "empty": -1.0}
    circuit = {"behavior": "induction", "size": 3, "granularity": "nodes", "reference": side}
    return {
        "model": "runs/little/model", "reference": "some-lab/little-llama",
        "fidelity": {
            "kl": 0.0312, "top1_agreement": 0.914, "perplexity": 9.5, "reference_perplexity": 8.25, "tokens": 4096,
            "bytes": nbytes,
        },
        "behaviors": [
            {
                "name": name, "metric": "sentence", "pairs": 40, "able": True, "lost": lost, "accuracy": now,
                "reference_accuracy": 0.95, "stderr": 0.08, "reference_mean": 3.25, "mean": 0.5,
            }
            for name, now, lost in (("word-order", 0.93, False), ("agreement-of-distant-subjects", 0.6, True))
        ],
        "circuits": [
            circuit | {"model": side, "lost": False},
            circuit | {"behavior": "ioi", "model": {"reason": "the model does not do it at all"}, "lost": True},
        ],
        "layers": [
            {"blocks": b, "difference": 0.1 * b, "cosine": 1 - b / 100, "lens_kl": 0.02 * b, "lens_agreement": 0.9}
            for b in range(6)
        ],
        "heads": [{"layer": i, "head": h, "distance": 0.05 * (i + h)} for i in range(5) for h in range(6)],
        "patterns": [
            {"layer": 2, "head": 1, "pattern": "induction", "before": 0.8, "after": 0.1, "lost": True},
            {"layer": 1, "head": 3, "pattern": "first_position", "before": 0.9, "after": 0.88, "lost": False},
        ],
        "features": {
            "site": "L2.resid_post", "features": 512, "told": 300, "survivors": 0.87,
            "worst": [{"feature": f, "correlation": 0.1 * f, "reference_rate": 0.02, "rate": 0.001} for f in range(3)],
        },
        "cannot_prove": "Nothing is proved here.",
    }  # fmt: skip


def _groups(blocks: int, scale: int, cut: bool) -> tuple[Group, ...]:
    groups = []
    for layer in range(blocks):
        for role, (rows, cols) in ROLES.items():
            module, rows, cols = _module(layer, role), rows * scale, cols * scale
            if cut and role == "q" and layer == 0:
                spans = [(0, 16), (16, 24), (24, rows)]
                a, b, c = (Segment(module, "rows", i, j, j - i, cols) for i, j in spans)
                groups += [
                    Group(f"{module}:protected", layer, (b,), (UnitId(0, "head", 2),)),
                    Group(module, layer, (a, c)),
                ]
            else:
                groups.append(Group(module, layer, (Segment(module, "rows", 0, rows, rows, cols),)))
    return tuple(groups)


def _module(layer: int, role: str) -> str:
    return f"model.layers.{layer}.{'self_attn' if role in 'qkvo' else 'mlp'}.{role}_proj"


def _anatomy(blocks: int, heads: int, neurons: int, scale: int, linear: int, other: int) -> dict:
    return {
        "folder": "/models/little-llama", "model_type": "llama", "dtype": "bfloat16", "linear_bytes": linear,
        "other_bytes": other, "file_bytes": linear + other,
        "blocks": [
            {
                "index": layer, "heads": heads, "neurons": neurons,
                "matrices": [
                    {"module": _module(layer, role), "role": role, "rows": rows * scale, "cols": cols * scale}
                    for role, (rows, cols) in ROLES.items()
                ],
            }
            for layer in range(blocks)
        ],
    }  # fmt: skip


def _scores(blocks: int, heads: int, neurons: int, draw: np.random.Generator) -> tuple[tuple[UnitId, ...], np.ndarray]:
    units = [UnitId(layer, "head", i) for layer in range(blocks) for i in range(heads)]
    units += [UnitId(layer, "neuron", i) for layer in range(blocks) for i in range(neurons)]
    values = draw.lognormal(-9, 1.6, len(units))
    values[: blocks * heads] *= 40
    return tuple(units), values


def _exact(prices: Prices, draw: np.random.Generator) -> dict:
    rows = []
    for i, group in enumerate(prices.groups):
        for name in FORMATS[1:3]:
            price = float(prices.nats[i, prices.column(name)])
            rows.append({"group": group.name, "format": name, "price": price})
            rows[-1]["exact_kl"] = price * float(draw.lognormal(0, 0.35))
    rows[0]["exact_kl"] = -1e-9
    return {"rows": rows, "spearman": 0.9312, "median_ratio": 1.0471}
