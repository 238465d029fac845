"""What the `sae` commands do: train, score, show features and steer, each with the evidence that its figures are."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import Console, table
from ..errors import CircuitpressError, RecipeError
from ..files import write_bytes_atomic
from .opening import Opened, open_model

if TYPE_CHECKING:
    import torch

    import circuitpress.mech.flow
    import circuitpress.mech.sae

Result = tuple[str, dict[str, Any]]

HELD_OUT = 64
"""Windows on which a trained SAE is judged, never trained on."""


def train_sae(
    model: str, console: Console, *, site: str, latents: int, k: int, out: Path, text: Path | None, tokens: int,
    architecture: str, steps: int | None, batch: int, lr: float | None, length: int, skip: int, seed: int,
    device: str | None,
) -> Result:  # fmt: skip
    """Trains on about `tokens` tokens, judges on other windows, and leaves an SAELens folder with train.json."""
    from ..data import split
    from ..mech.sae import save_sae
    from ..mech.sae.formats import describe
    from ..mech.sae.judge import judge
    from ..mech.sae.rows import gather
    from ..mech.sae.train import Training, train
    from ..mech.sites import Site

    where = Site.parse(site)
    kind: Any = architecture
    settings = Training(latents, k, architecture=kind, steps=steps or 1, batch=batch, lr=lr, seed=seed)
    opened = open_model(model, device=device, spill=out / "spill")
    where.width(opened.stream.anatomy)
    length = min(length, opened.stream.anatomy.context or length)
    wanted = -(-tokens // max(1, length - skip))
    found = opened.windows(text, samples=wanted + HELD_OUT, length=length, seed=seed)
    training, held_out = split(found, wanted, HELD_OUT)
    started = time.monotonic()
    with console.progress("activations", where.layer + 1) as advance:
        rows = gather(opened.stream, training.ids, where, skip=skip, advance=advance)
    settings = replace(settings, steps=steps or max(1, rows.total // batch), batch=min(batch, rows.total))
    collected = time.monotonic() - started
    try:
        with console.progress("training", 20) as advance:
            sae = train(rows, settings, state=out / "state.safetensors", device=opened.stream.device, advance=advance)
    finally:
        rows.close()
    trained = time.monotonic() - started - collected
    save_sae(sae, out)
    with console.progress("judging", opened.stream.depth) as advance:
        quality = judge(opened.stream, held_out.ids, sae, advance=advance).to_json()
    document = {
        "model": model,
        "sae": describe(sae),
        "out": str(out),
        "settings": vars(settings) | {"lr": settings.peak},
        "rows": rows.total,
        "seconds": {"activations": collected, "training": trained},
        "text": found.describe(),
        "quality": quality,
    }
    write_bytes_atomic(out / "train.json", (json.dumps(document, indent=1) + "\n").encode())
    lines = [("rows", f"{rows.total}"), ("seconds", f"{collected:.0f} + {trained:.0f}"), *_quality_rows(quality)]
    return table(
        f"{out}: {latents} latents at {where}", lines
    ) + f"\nnext: circuitpress sae features {model} {out}", document


def score_sae(
    model: str, sae_folder: Path, console: Console, *, site: str | None, text: Path | None, windows: int, length: int,
    behaviors: Path | None, top: int, integrate: int, device: str | None,
) -> Result:  # fmt: skip
    """Quality on text, and what the features contribute to the text's loss or to behaviors."""
    from ..mech.flow import text_loss
    from ..mech.sae.formats import describe
    from ..mech.sae.judge import judge

    opened = open_model(model, device=device, spill=None)
    sae = open_sae(sae_folder, site, opened)
    chosen = opened.windows(text, samples=windows, length=length)
    with console.progress("judging", opened.stream.depth) as advance:
        quality = judge(opened.stream, chosen.ids, sae, advance=advance).to_json()
    if behaviors is None:
        few = opened.stream.batches(chosen.ids[:8])
        subjects = [("minus the loss on the text, nats per token", few, text_loss(opened.stream, few))]
    else:
        subjects = _behaviors(opened, behaviors)
    found = []
    for name, batches, objective in subjects:
        with console.progress("features") as advance:
            found.append(_contributions(opened, sae, name, batches, objective, top, integrate, advance))
    document = {"model": model, "sae": describe(sae), "text": chosen.describe(), "quality": quality, "features": found}
    lines = _quality_rows(quality)
    parts = [table(f"{sae_folder} in {model}", lines)]
    for entry in found:
        rows: list[tuple[str, ...]] = [("feature", "integrated", "first order", "closed (exact)")]
        for row in entry["rows"]:
            rows.append((str(row["feature"]), *(f"{row[key]:+.4g}" for key in ("integrated", "first_order", "closed"))))
        parts.append(table(entry["objective"], rows))
    return "\n\n".join(parts), document


def show_features(
    model: str, sae_folder: Path, console: Console, *, site: str | None, features: Sequence[int], count: int,
    text: Path | None, windows: int, length: int, out: Path, device: str | None,
) -> Result:  # fmt: skip
    """Maximally activating text of features as features.json and features.svg, beside random excerpts."""
    from ..mech.examples import activating
    from ..mech.lens.figures import draw
    from ..mech.lens.inspect import CANNOT_PROVE
    from ..mech.sae.formats import describe
    from ..mech.sae.judge import own_site

    opened = open_model(model, device=device, spill=None)
    sae = open_sae(sae_folder, site, opened)
    chosen = opened.windows(text, samples=windows, length=length)
    picked = in_range(features, sae) or spread(opened, sae, chosen.ids, count)
    with console.progress("features", own_site(sae).layer + 1) as advance:
        rows = activating(
            opened.stream, chosen.ids, own_site(sae), [f"feature {index}" for index in picked],
            lambda _: lambda x: sae.encode(x)[0][..., picked], skip=sae.skip, advance=advance,
        )  # fmt: skip
    document: dict[str, Any] = {
        "view": "text",
        "model": opened.stream.anatomy.folder.resolve().name,
        "evidence": "correlational",
        "cannot_prove": CANNOT_PROVE["text"],
        "sae": describe(sae),
        "text": chosen.describe(),
        "parts": [row.to_json(opened.decode) for row in rows],
    }
    write_bytes_atomic(out / "features.json", (json.dumps(document) + "\n").encode())
    draw(document, out / "features.svg")
    lines = [(row.part, f"fires on {100 * row.firing_rate:.2f} %", _peak_text(row, opened)) for row in rows]
    return table(f"{out / 'features.svg'}", lines), document


def steer_model(
    model: str, sae_folder: Path, console: Console, *, site: str | None, feature: int, alphas: Sequence[float],
    text: Path | None, windows: int, length: int, device: str | None,
) -> Result:  # fmt: skip
    """Adds alpha times a feature's direction at every position and measures what the model then predicts."""
    from ..mech.sae.formats import describe
    from ..mech.sae.judge import own_site
    from ..mech.sae.steer import steer

    opened = open_model(model, device=device, spill=None)
    sae = open_sae(sae_folder, site, opened)
    in_range([feature], sae)
    chosen = opened.windows(text, samples=windows, length=length)
    with console.progress("steering") as advance:
        found = steer(opened.stream, chosen.ids, own_site(sae), sae.directions()[feature], alphas, advance=advance)
    rows = []
    for entry in found:
        order = entry.change.argsort()
        rows.append(
            {key: value for key, value in vars(entry).items() if key != "change"}
            | {
                "promoted": [_moved(opened, entry.change, token) for token in order[::-1][:10].tolist()],
                "suppressed": [_moved(opened, entry.change, token) for token in order[:10].tolist()],
            }
        )
    document = {
        "model": model, "sae": describe(sae), "feature": feature, "evidence": "causal", "text": chosen.describe(),
        "rows": rows,
    }  # fmt: skip
    lines = [("alpha", "KL", "random direction", "loss", "promotes")]
    lines += [
        (f"{r['alpha']:g}", f"{r['kl']:.4f}", f"{r['control_kl']:.4f}", f"{r['loss'] - r['reference_loss']:+.4f}",
         " ".join(entry["text"].strip() for entry in r["promoted"][:5]))
        for r in rows
    ]  # fmt: skip
    return table(f"feature {feature} of {sae_folder}: nats per token", lines), document


def open_sae(folder: Path, site: str | None, opened: Opened) -> "circuitpress.mech.sae.Sae":
    """The SAE of a folder, which must fit the model."""
    from ..mech.sae import load_sae
    from ..mech.sae.judge import require_fit
    from ..mech.sites import Site

    sae = load_sae(folder, site=None if site is None else Site.parse(site))
    require_fit(opened.stream, sae)
    return sae


def _behaviors(opened: Opened, path: Path) -> "list[tuple[str, list[torch.Tensor], circuitpress.mech.flow.Objective]]":
    from ..behaviors import Pairs, load_behaviors
    from ..mech.flow import logit_difference

    found = []
    for behavior in load_behaviors(path, opened.tokenizer):
        if isinstance(behavior.pairs, Pairs):
            found.append((f"{behavior.name}: logit difference", *logit_difference(opened.stream, behavior.pairs)))
    if not found:
        raise CircuitpressError(f"{path} holds no behavior of contrast pairs", hint="features need an answer token")
    return found


def _contributions(
    opened: Opened, sae: "circuitpress.mech.sae.Sae", name: str, batches: "list[torch.Tensor]",
    objective: "circuitpress.mech.flow.Objective", top: int, integrate: int, advance: Any,
) -> dict[str, Any]:  # fmt: skip
    """The features that contribute most, by integrated gradients, with their first-order and their exact effect."""
    from ..mech.sae.attribute import closed, first_order, integrated

    # Means over tokens for a text, over sequences for a behavior.
    per = sum(ids[:, 1:].numel() if "per token" in name else len(ids) for ids in batches)
    path = integrated(opened.stream, batches, sae, objective, steps=integrate, advance=advance)
    once = first_order(opened.stream, batches, sae, objective, advance=advance)
    order = path.features.abs().argsort(descending=True)[:top].tolist()
    exact = closed(opened.stream, batches, sae, objective, order, advance=advance)
    rows = [
        {
            "feature": feature,
            "integrated": float(path.features[feature]) / per,
            "first_order": float(once.features[feature]) / per,
            "closed": -float(value) / per,
        }
        for feature, value in zip(order, exact.tolist(), strict=True)
    ]
    return {
        "objective": name,
        "evidence": {"integrated": "gradient", "first_order": "gradient", "closed": "causal"},
        "note": "contributions; closing a feature changes the objective by minus `closed`",
        "all_features": float(path.features.sum()) / per,
        "missed_by_the_rule": (path.gap or 0.0) / per,
        "first_order_bias": once.bias / per,
        "first_order_error": once.error / per,
        "rows": rows,
    }


def spread(opened: Opened, sae: "circuitpress.mech.sae.Sae", ids: "torch.Tensor", count: int) -> list[int]:
    """`count` features that fire, evenly spread from the most to the least frequent."""
    from ..mech.sae.judge import own_site
    from ..mech.sites import collect

    site = own_site(sae)
    batches = opened.stream.batches(ids)
    store = collect(opened.stream, batches, [site])
    fired = sum((sae.encode(store.get((str(site), b)))[0][:, sae.skip :] > 0).sum((0, 1)) for b in range(len(batches)))
    order = [index for index in fired.argsort(descending=True).tolist() if fired[index] > 0]  # pyright: ignore
    if not order:
        raise CircuitpressError("no feature fires on this text", hint="pass another --text, or check --site")
    step = max(1.0, (len(order) - 1) / max(1, count - 1))
    return sorted({order[min(len(order) - 1, round(i * step))] for i in range(count)})


def in_range(features: Sequence[int], sae: "circuitpress.mech.sae.Sae") -> list[int]:
    """The features, if there are such ones; else RecipeError."""
    wrong = [f"feature {index} does not exist" for index in features if not 0 <= index < sae.latents]
    if wrong:
        raise RecipeError(wrong, hint=f"features are 0 to {sae.latents - 1}")
    return list(features)


def _quality_rows(quality: dict[str, Any]) -> list[tuple[str, ...]]:
    names = {
        "fvu": "FVU (held out)", "l0": "L0", "dead_share": "never fired here", "loss_recovered": "loss recovered",
        "loss_recovered_from_mean": "  against the mean", "kl_sae": "KL spliced, nats/token", "kl_score": "KL score",
    }  # fmt: skip
    return [(label, f"{quality[name]:.4f}") for name, label in names.items()]


def _peak_text(row: Any, opened: Opened) -> str:
    if not row.top:
        return ""
    best = row.top[0]
    return "".join(opened.decode(token) for token in best.ids[max(0, best.peak - 4) : best.peak + 1]).replace("\n", " ")


def _moved(opened: Opened, change: Any, token: int) -> dict[str, Any]:
    return {"token": token, "text": opened.decode(token), "change": float(change[token])}
