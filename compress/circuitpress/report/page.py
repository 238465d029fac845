"""From a run's files to what the template shows: every number formatted, every figure drawn, every gap explained."""

from collections.abc import Mapping, Sequence
from typing import Any

from .. import __version__
from .audited import build_audit
from .pictures import draw_bits, draw_check, draw_front, draw_heads, draw_neurons, draw_prices, draw_tasks, place_of
from .read import RunFiles
from .values import Row, duration, nats, size

LOSERS = 12
_TARGET_NOTES = {
    "gguf": ": bits are those of llama.cpp's types; KL and the bytes of files are of formats that stand in for them"
}


def build_context(run: RunFiles) -> dict[str, Any]:
    """The template's variables; a section whose file is missing gets None, and the template says what produces it."""
    plan, measured = run.plan, run.fidelity
    reference = 8 * float(_dense_bytes(run)) / plan.linear_numel
    return {
        "name": _model_name(run),
        "version": run.manifest.get("version", __version__),
        "versions": run.manifest.get("versions", {}),
        "command": run.manifest.get("command") or f"circuitpress run {run.folder.name}/recipe.yaml --out again",
        "folder": run.folder.name,
        "bits": f"{plan.bits_per_weight:.2f}",
        "reference_bits": f"{reference:.4g}",
        "asked": _asked(run),
        "recipe": run.recipe_text,
        "predicted": nats(plan.predicted_kl),
        "corrected": None if plan.predicted_kl_corrected is None else nats(plan.predicted_kl_corrected),
        "bound": nats(plan.bound_kl),
        "measured": None if measured is None else _measured(measured),
        "linear_bytes": size(plan.linear_bytes),
        "file_bytes": size(plan.linear_bytes + plan.other_bytes if measured is None else measured["bytes"]),
        "reference_bytes": size(run.anatomy["file_bytes"]),
        "table": _before_after(run, reference),
        "errors": _prediction_errors(run),
        "bit_map": draw_bits(run),
        "price": draw_prices(run),
        "heads": draw_heads(run),
        "neurons": draw_neurons(run),
        "pareto": draw_front(run),
        "has_probes": bool(run.probes),
        "check": draw_check(run),
        "losers": _losers(run),
        "behaviors": [_behavior(row) for row in run.behaviors],
        "leaning": [nats(kl) for kl in run.leaning or ()],
        "audit": None if run.audit is None else build_audit(run.audit),
        "tasks": [_task(row) for row in run.tasks.get("rows", []) if row["asked"]],
        "task_plot": draw_tasks(run),
        "recovery": None if run.tasks.get("recovery") is None else f"{run.tasks['recovery']:.1%}",
        "harness": run.tasks.get("provenance", {}).get("lm_eval"),
        "stages": [Row(name, (duration(seconds),)) for name, seconds in run.manifest.get("journal", {}).items()],
        "fingerprints": _fingerprints(run.manifest.get("fingerprints", {})),
    }


def _model_name(run: RunFiles) -> str:
    model = str(run.recipe.get("model") or run.anatomy.get("folder") or run.folder)
    parts = model.rstrip("/").split("/")
    return "/".join(parts[-2:]) if parts[-1] in ("checkpoint", "model") or not model.startswith("/") else parts[-1]


def _dense_bytes(run: RunFiles) -> float:
    width = {"float32": 4, "bfloat16": 2, "float16": 2}.get(run.anatomy.get("dtype", ""), 2)
    return run.anatomy.get("linear_bytes") or width * run.plan.linear_numel


def _asked(run: RunFiles) -> list[Row]:
    plan, data = run.plan, run.recipe.get("data") or {}
    blocks = run.anatomy["blocks"]
    kept = sorted({decision.group.name for decision in plan.decisions if decision.protected})
    model = f"{_model_name(run)}: {run.anatomy['model_type']}, {len(blocks)} blocks, {run.anatomy['dtype']}"
    protected = f"{len(kept)} group{'s' if len(kept) > 1 else ''}: {', '.join(kept[:4])}{' …' if len(kept) > 4 else ''}"
    rows = [
        Row("Model", (model,)),
        Row("Linear weights", (f"{plan.linear_numel:,}, beside {size(plan.other_bytes)} of other weights",)),
        Row("Budget", (plan.budget,)),
        Row("Target", (plan.target + _TARGET_NOTES.get(plan.target, ""),)),
        Row("Formats on offer", (", ".join(run.prices.formats),)),
        Row("Protected", (protected if kept else "none",)),
    ]
    if data:
        text = str(data.get("calibration") or "the text that comes with circuitpress").split("/")[-1]
        rows.append(Row("Calibration", (f"{text}, {data.get('samples')} windows of {data.get('length')} tokens",)))
    return rows


def _measured(fidelity: Mapping[str, Any]) -> dict[str, str]:
    error = fidelity.get("kl_stderr")
    return {
        "kl": nats(fidelity["kl"]),
        "kl_error": "" if error is None else f"± {error:.2g}",
        "top1": f"{fidelity['top1_agreement']:.1%}",
        "perplexity": f"{fidelity['perplexity']:.2f}",
        "reference_perplexity": f"{fidelity['reference_perplexity']:.2f}",
        "tokens": f"{fidelity['tokens']:,}",
    }


def _before_after(run: RunFiles, reference: float) -> list[Row]:
    plan, fidelity, after = run.plan, run.fidelity, run.plan.linear_bytes
    bits = plan.bits_per_weight
    dense, files = _dense_bytes(run), run.anatomy["file_bytes"]
    whole = after + plan.other_bytes if fidelity is None else fidelity["bytes"]
    rows = [
        Row("Bits per linear weight", (f"{reference:.4g}", f"{bits:.3f}", _ratio(bits, reference))),
        Row("Linear weights", (size(dense), size(after), _ratio(after, dense))),
        Row("Other weights", (size(files - dense), size(whole - after), _ratio(whole - after, files - dense))),
        Row("All weight files", (size(files), size(whole), _ratio(whole, files))),
    ]
    if fidelity is not None:
        before, now = fidelity["reference_perplexity"], fidelity["perplexity"]
        rows += [
            Row("Perplexity", (f"{before:.3f}", f"{now:.3f}", f"{now / before - 1:+.1%}")),
            Row("KL to the original, nats", ("0", nats(fidelity["kl"]), "")),
            Row("Same most likely token", ("100%", f"{fidelity['top1_agreement']:.1%}", "")),
        ]
    return rows


def _ratio(after: float, before: float) -> str:
    return f"× {after / before:.3f}" if before > 0 else ""


def _prediction_errors(run: RunFiles) -> list[Row]:
    """Predicted against measured, as ratios."""
    if run.fidelity is None or run.fidelity["kl"] <= 0:
        return []
    kl, plan = run.fidelity["kl"], run.plan
    pairs = [("Predicted: sum of prices", plan.predicted_kl), ("Corrected by the probes", plan.predicted_kl_corrected)]
    off = [(name, value, round(value / kl - 1, 2) or 0.0) for name, value in pairs if value is not None]
    rows = [Row(name, (nats(value), f"{change:+.0%}")) for name, value, change in off]
    return [*rows, Row("Measured on held-out text", (nats(kl), ""))]


def _behavior(row: Mapping[str, Any]) -> Row:
    shares = (f"{row['reference_accuracy']:.1%}", f"{row['accuracy']:.1%}")
    margins = (f"{row['reference_margin']:.3g}", f"{row['margin']:.3g}")
    return Row(row["name"], ("kept" if row["kept"] else "LOST", *shares, *margins, str(row["pairs"])))


def _task(row: Mapping[str, Any]) -> Row:
    error = row["difference_stderr"]
    change = f"{row['difference']:+.3g}" + ("" if error is None else f" ± {error:.2g}")
    name = f"{row['task']} · {row['metric']}" + ("" if row["higher_is_better"] else " (less is better)")
    return Row(name, (f"{row['reference']:.4g}", f"{row['value']:.4g}", change, str(row["documents"] or "")))


def _losers(run: RunFiles) -> list[Row]:
    total = run.plan.predicted_kl
    rows = []
    for decision in sorted(run.plan.decisions, key=lambda entry: -entry.nats)[:LOSERS]:
        segment = decision.group.segments[0]
        layer, role = place_of(run, segment.module, decision.group.layer)
        whole = len(decision.group.segments) == 1 and decision.group.name == segment.module
        part = "" if whole else f" {decision.group.name.removeprefix(segment.module)}"
        share = f"{decision.nats / total:.1%}" if total > 0 else ""
        rows.append(
            Row(f"{layer} · {role}{part}", (decision.format, size(decision.nbytes), nats(decision.nats), share))
        )
    return rows


def _fingerprints(prints: Mapping[str, Any]) -> Sequence[Row]:
    named = [(name, value) for name, value in prints.items() if name.startswith(("weights.", "text.", "code."))]
    return [Row(name, (str(value)[:16],)) for name, value in named if value is not None]
