"""What `audit` and `monitor` do: two models side by side on one text, or one model against a record."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..anatomy import Anatomy
from ..console import Console, table
from ..errors import CircuitpressError
from ..files import write_bytes_atomic
from .asking import ask_behaviors, ask_circuits, read_behaviors
from .opening import Opened, open_model

if TYPE_CHECKING:
    import torch

    import circuitpress.mech.sae

Result = tuple[str, dict[str, Any]]
SEGMENT = 48
"""Tokens of the random segment that is repeated to see which heads have which pattern."""
CANNOT_PROVE = (
    "Attention patterns, states, the logit lens and SAE features are correlational: a difference need not matter, and "
    "none found is no proof that nothing was lost. Behaviors and KL are measured on the models' own outputs, on these "
    "prompts and this text only."
)


def audit_models(
    model: str, console: Console, *, reference: str, out: Path, text: Path | None = None, windows: int = 16,
    length: int = 256, behaviors: Path | None = None, safety: bool = True, circuits: Sequence[Path] = (),
    sae: Path | None = None, site: str | None = None, seed: int = 0, device: str | None = None,
) -> Result:  # fmt: skip
    """Compares `model` with `reference` and writes audit.json and audit.html into `out`.

    The models need one tokenizer; layer by layer they are compared where they have the same shape. `safety` measures
    the safety set of chat models as well. `circuits` are measured on the prompts of `behaviors` that bear their name.
    Raises CircuitpressError for models that do not share a vocabulary.
    """
    from ..evaluate import fidelity
    from ..report import write_audit

    after = open_model(model, device=device, spill=out / "spill" / "model")
    before = open_model(reference, device=device, spill=out / "spill" / "reference")
    first, second = before.stream.anatomy, after.stream.anatomy
    if first.vocab != second.vocab:
        raise CircuitpressError(
            f"the vocabularies have {first.vocab} and {second.vocab} tokens: the models predict different things",
            hint="audit compares models with one tokenizer, such as a model and what compression made of it",
        )
    # First, what was asked for and can be wrong.
    chosen = before.windows(text, samples=windows, length=length, seed=seed)
    dictionary = _load(sae, site)
    unfit: dict[str, str] = {}
    wanted, added = read_behaviors(before, behaviors, unfit, safety=safety)
    standing = ask_circuits(before, after, circuits, wanted, console) if circuits else []
    with console.progress("fidelity", (*first.work, *second.work)) as advance:
        measured = fidelity(after.stream, before.stream, chosen.ids, advance=advance)
    document: dict[str, Any] = {
        "model": model,
        "reference": reference,
        "text": chosen.describe(),
        "fidelity": measured.to_json(),
        "cannot_prove": CANNOT_PROVE,
        "behaviors": ask_behaviors(before, after, wanted, added, console) if wanted else [],
        "unfit": unfit,
        "circuits": standing,
    }
    alike = _comparable(first, second)
    if alike:
        document |= _inside(before, after, chosen.ids, chosen.bos, seed, console)
    if dictionary is not None:
        document["features"] = {"sae": str(sae), **_features(before, after, dictionary, chosen.ids, console)}
    write_bytes_atomic(out / "audit.json", (json.dumps(document, indent=1) + "\n").encode())
    document["page"] = str(write_audit(document, out / "audit.html"))
    return _render(document, alike=alike), document


def fit(
    model: str, console: Console, *, out: Path, site: str, text: Path | None = None, windows: int = 64,
    length: int = 128, sae: Path | None = None, quantile: float = 0.95, seed: int = 0, device: str | None = None,
) -> Result:  # fmt: skip
    """Fits a monitor on reference text and writes it to the file `out`."""
    from ..audit import fit_monitor, save_monitor
    from ..mech.sites import Site

    opened = open_model(model, device=device, spill=out.parent / "spill")
    chosen = opened.windows(text, samples=windows, length=length, seed=seed)
    with console.progress("monitor", opened.stream.depth) as advance:
        monitor = fit_monitor(
            opened.stream, chosen.ids, Site.parse(site), sae=_load(sae), quantile=quantile, advance=advance
        )
    save_monitor(monitor, out)
    document = {"monitor": str(out), "site": site, "text": chosen.describe(), "evidence": "correlational"}
    document |= {"thresholds": monitor.thresholds, "false_positives": monitor.false_positives, "stderr": monitor.stderr}
    rows = [("measure", "threshold", "flags of unseen text")]
    for name, threshold in monitor.thresholds.items():
        rate = f"{monitor.false_positives[name]:.1%} +- {monitor.stderr:.1%}"
        rows.append((name, f"{threshold:.3g}", rate))
    return f"{table(f'{model} at {site}', rows)}\n\n{out}", document


def check(
    model: str, console: Console, *, monitor: Path, text: Path, windows: int = 64, length: int = 128,
    sae: Path | None = None, seed: int = 0, device: str | None = None,
) -> Result:  # fmt: skip
    """How many windows of `text` a monitor flags, and the most unusual of them."""
    from ..audit import load_monitor, surprise

    record = load_monitor(monitor)
    opened = open_model(model, device=device, spill=monitor.parent / "spill")
    chosen = opened.windows(text, samples=windows, length=length, seed=seed)
    with console.progress("monitor", opened.stream.depth) as advance:
        seen = surprise(opened.stream, chosen.ids, record, sae=_load(sae), advance=advance)
    rows = [("measure", "threshold", "median", "flagged", "expected")]
    document: dict[str, Any] = {"evidence": "correlational"}
    for name, values in seen.items():
        flagged = float((values > record.thresholds[name]).mean())
        order = np.argsort(-values, kind="stable")[:5].tolist()
        document[name] = {
            "flagged": flagged,
            "expected": record.false_positives[name],
            "threshold": record.thresholds[name],
            "values": values.tolist(),
            "most_unusual": [
                {"value": float(values[i]), "text": str(opened.tokenizer.decode(chosen.ids[i].tolist()))} for i in order
            ],
        }
        expected = f"{record.false_positives[name]:.1%}"
        rows.append((name, f"{record.thresholds[name]:.3g}", f"{np.median(values):.3g}", f"{flagged:.1%}", expected))
    return table(f"{text.name} in {model}", rows), document | {"text": chosen.describe()}


def _comparable(first: Anatomy, second: Anatomy) -> bool:
    return (len(first.blocks), first.hidden) == (len(second.blocks), second.hidden)


def _inside(
    before: Opened, after: Opened, ids: "torch.Tensor", bos: int | None, seed: int, console: Console
) -> dict[str, Any]:
    from ..audit import drift, lost_heads
    from ..mech.lens.attention import head_scores, repeated

    with console.progress("drift", before.stream.depth) as advance:
        found = drift(before.stream, after.stream, ids, advance=advance)
    anatomy = before.stream.anatomy
    segment = min(SEGMENT, (anatomy.context or 2 * SEGMENT + 1) // 2 - 1, anatomy.vocab - len(before.special) - 1)
    tokens = repeated(anatomy.vocab, segment=segment, samples=8, seed=seed, first=bos, avoid=before.special)
    with console.progress("heads", 2 * before.stream.depth) as advance:
        scores = [head_scores(opened.stream, tokens, segment, advance=advance) for opened in (before, after)]
    same = [(s.layer, s.head) for s in scores[0]] == [(s.layer, s.head) for s in scores[1]]
    return {
        "layers": [asdict(layer) for layer in found.layers],
        "heads": [asdict(head) for head in found.heads],
        "patterns": [asdict(change) for change in lost_heads(*scores)] if same else [],
        "segment": segment,
    }


def _features(
    before: Opened, after: Opened, loaded: "circuitpress.mech.sae.Sae", ids: "torch.Tensor", console: Console
) -> dict[str, Any]:
    from ..audit import survival

    with console.progress("features", 2 * before.stream.depth) as advance:
        found = survival(before.stream, after.stream, loaded, ids, advance=advance)
    worst = found.worst(12)
    return {
        "site": str(loaded.site),
        "features": loaded.latents,
        "told": found.told,
        "survivors": found.survivors,
        "tokens": found.tokens,
        "evidence": "correlational",
        "worst": [
            {
                "feature": feature,
                "correlation": float(found.correlation[feature]),
                "reference_rate": float(found.rates[0, feature]),
                "rate": float(found.rates[1, feature]),
            }
            for feature in worst
        ],
    }


def _load(path: Path | None, site: str | None = None) -> "circuitpress.mech.sae.Sae | None":
    """The SAE at `path`, for `site` if its folder says another place or none."""
    from ..mech.sae import load_sae
    from ..mech.sites import Site

    if path is None:
        return None
    loaded = load_sae(path)
    return replace(loaded, site=Site.parse(site)) if site else loaded


def _render(document: dict[str, Any], *, alike: bool) -> str:
    found = document["fidelity"]
    rows: list[tuple[str, ...]] = [("", "reference", "model")]
    lost: list[str] = []
    rows.append(("perplexity", f"{found['reference_perplexity']:.3f}", f"{found['perplexity']:.3f}"))
    rows.append(("KL, nats per token", "", f"{found['kl']:.4g}"))
    for row in document["behaviors"]:
        rows.append((row["name"], f"{row['reference_accuracy']:.1%}", f"{row['accuracy']:.1%}"))
    for row in document["circuits"]:
        held = row["model"].get("faithfulness")
        now = "lost" if held is None else f"{held['value']:.3f}"
        rows.append((f"circuit of {row['behavior']}", f"{row['reference']['faithfulness']['value']:.3f}", now))
    if alike:
        patterns = document["patterns"]
        lost = [f"L{p['layer']}H{p['head']} {p['pattern'].replace('_', ' ')}" for p in patterns if p["lost"]]
        rows.append(("heads with a pattern", str(len(patterns)), str(len(patterns) - len(lost))))
    if "features" in document:
        survivors = document["features"]["survivors"]
        rows.append(("SAE features that survive", str(document["features"]["told"]), f"{survivors:.1%}"))
    text = table(f"{document['model']} against {document['reference']}", rows)
    text += "".join(f"\nleft out: {name}: {reason}" for name, reason in document["unfit"].items())
    if lost:
        text += "\nlost: " + ", ".join(lost)
    if not alike:
        text += "\nlayers are not compared: the models have other shapes"
    return f"{text}\n\n{document['page']}"
