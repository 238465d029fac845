"""The result of a run, read back from its folder: one document, and the table that is printed at the end."""

import json
from pathlib import Path
from typing import Any

from ..console import size, table
from ..plan import Difference
from ..plan.targets import tensor_type
from ..units import Plan
from .folder import RunFolder
from .tasks import task_lines


def summarize(folder: RunFolder, model: str) -> dict[str, Any]:
    """The document of `run --json`: fidelity.json with the plan's predictions, paths and seconds."""
    plan = Plan.load(folder.path / "plan.json")
    fidelity = json.loads((folder.path / "evaluate" / "fidelity.json").read_text())
    anatomy = json.loads((folder.path / "anatomy.json").read_text())
    judged, planned = folder.path / "evaluate" / "behaviors.json", folder.path / "behaviors.json"
    if judged.exists():
        fidelity["behaviors"] = json.loads(judged.read_text())
        fidelity["behaviors_take"] = json.loads(planned.read_text())["takes"]
    tasks = folder.path / "evaluate" / "tasks.json"
    if tasks.exists() and (compared := json.loads(tasks.read_text()))["rows"]:
        fidelity |= {"tasks": compared["rows"], "recovery": compared["recovery"]}
    if plan.target == "gguf":
        fidelity["llama_cpp"] = llama_cpp(plan)
    return fidelity | {
        "model": model,
        "out": str(folder.path),
        "model_folder": str(folder.path / "model"),
        "report": str(folder.path / "report.html"),
        "budget": plan.budget,
        "target": plan.target,
        "predicted_kl": plan.predicted_kl,
        "predicted_kl_corrected": plan.predicted_kl_corrected,
        "reference_linear_bytes": anatomy["linear_bytes"],
        "reference_bits_per_weight": 8 * anatomy["linear_bytes"] / anatomy["linear_numel"],
        "seconds": sum(folder.journal.values()),
        "stages": dict(folder.journal),
    }


def llama_cpp(plan: Plan) -> dict[str, Any]:
    """What llama.cpp will store of a plan for it: bits and bytes, and the share of the weights of each of its types.

    The plan counts its bytes; the model in the run folder is stored in formats that stand in for its types.
    """
    numel: dict[str, int] = {}
    for decision in plan.decisions:
        for segment in decision.group.segments:
            kind = tensor_type(decision.format, segment.cols)
            assert kind is not None  # a rule of the plan
            numel[kind.name] = numel.get(kind.name, 0) + segment.numel
    return {
        "bits_per_weight": plan.bits_per_weight,
        "linear_bytes": plan.linear_bytes,
        "bytes": plan.linear_bytes + plan.other_bytes,
        "types": {name: n / sum(numel.values()) for name, n in sorted(numel.items())},
    }


def render_run(document: dict[str, Any]) -> str:
    """The final table of `run`, within 80 columns but for paths."""
    name = Path(document["model"]).name if Path(document["model"]).is_absolute() else document["model"]
    d = document
    rows: list[tuple[str, ...]] = [
        ("", "before", "after"),
        ("bits per weight", f"{d['reference_bits_per_weight']:.2f}", f"{d['bits_per_weight']:.3f}"),
        ("linear weights", size(d["reference_linear_bytes"]), size(d["linear_bytes"])),
        ("all weight files", size(d["reference_bytes"]), size(d["bytes"])),
        ("perplexity", number(d["reference_perplexity"]), number(d["perplexity"])),
        ("top-1 agreement", "", f"{100 * d['top1_agreement']:.1f} %"),
    ]
    theirs = d.get("llama_cpp")
    if theirs:
        cells = (
            "in llama.cpp",
            f"{theirs['bits_per_weight']:.3f}",
            size(theirs["linear_bytes"]),
            size(theirs["bytes"]),
        )
        rows[:4] = [(*row, cell) for row, cell in zip(rows, cells, strict=False)]
    return "\n".join(
        [
            table(f"{name} at {d['budget']}", rows),
            *(["", _types_line(theirs)] if theirs else []),
            "",
            kl_lines(d),
            *_behavior_lines(d.get("behaviors", [])),
            *(task_lines({"rows": d["tasks"], "recovery": d["recovery"]}) if "tasks" in d else []),
            "",
            f"{d['tokens']} test tokens; the run took {d['seconds']:.1f} s",
            "",
            f"model   {d['model_folder']}",
            f"report  {d['report']}",
        ]
    )


def _types_line(theirs: dict[str, Any]) -> str:
    types = ", ".join(f"{name} {100 * share:.0f} %" for name, share in theirs["types"].items())
    return f"types: {types}\nall that is measured is of formats that stand in for them"


def _behavior_lines(rows: list[dict[str, Any]]) -> list[str]:
    """What is left of the behaviors that the recipe names."""
    if not rows:
        return []
    lines = [("on prompts that nothing was fitted to", "before", "after", "keep", "")]
    for row in rows:
        before, after = row[f"reference_{row['of']}"], row[row["of"]]
        verdict = "kept" if row["kept"] else "LOST"
        lines.append((row["name"], f"{before:.3g}", f"{after:.3g}", f"{row['keep']:g}", verdict))
    return ["", table("behaviors", lines)]


def kl_lines(document: dict[str, Any]) -> str:
    """KL as predicted, corrected and measured."""
    corrected = document["predicted_kl_corrected"]
    lines = ["KL to the original, nats per token"]
    lines += [f"  predicted  {number(document['predicted_kl'])}  the sum of prices"]
    lines += [f"  corrected  {number(corrected)}  by probes on held-out text"] if corrected is not None else []
    return "\n".join([*lines, f"  measured   {number(document['kl'])} +- {document['kl_stderr']:.2g} on the test text"])


def render_fidelity(document: dict[str, Any], model: str, reference: str) -> str:
    """The table of `eval`; baselines of the reference are more columns, those that could not be made are lines."""
    asked: dict[str, dict[str, Any]] = document.get("baselines", {})
    others = {name: d for name, d in asked.items() if "error" not in d}
    columns = [document, *others.values()]
    rows = [
        ("", "reference", "model", *others),
        ("all weight files", size(document["reference_bytes"]), *(size(d["bytes"]) for d in columns)),
        ("bits per weight", "", *(f"{d['bits_per_weight']:.3f}" for d in columns)),
        ("perplexity", number(document["reference_perplexity"]), *(number(d["perplexity"]) for d in columns)),
        ("KL, nats per token", "", *(number(d["kl"]) for d in columns)),
        ("+-", "", *(f"{d['kl_stderr']:.2g}" for d in columns)),
        ("top-1 agreement", "", *(f"{100 * d['top1_agreement']:.1f} %" for d in columns)),
    ]
    lines = [table(f"{model} against {reference}", rows), ""]
    lines += [f"{name}: {d['setting']}" for name, d in others.items() if "setting" in d]
    lines += [
        f"{name} is missing: {d['error']}" + (f"\nnext: {d['hint']}" if d["hint"] else "")
        for name, d in asked.items()
        if "error" in d
    ]
    return "\n".join([*lines, f"{document['tokens']} tokens, {document['seconds']:.1f} s"])


def render_plan(plan: Plan, anatomy_bytes: int) -> str:
    """The table of `plan`: what was spent, what it is predicted to cost, how many weights got which format."""
    numel: dict[str, int] = {}
    for decision in plan.decisions:
        numel[decision.format] = numel.get(decision.format, 0) + decision.group.numel
    rows = [("format", "weights", "share")]
    rows += [(name, f"{n:,}", f"{100 * n / plan.linear_numel:.1f} %") for name, n in sorted(numel.items())]
    corrected = plan.predicted_kl_corrected
    protected = sum(decision.protected for decision in plan.decisions)
    lines = [
        table(f"plan at {plan.budget}", rows),
        "",
        f"bits per weight      {plan.bits_per_weight:.3f}",
        f"linear weights       {size(plan.linear_bytes)}; with the rest {size(plan.linear_bytes + plan.other_bytes)}"
        f" of {size(anatomy_bytes)}",
        f"predicted KL         {number(plan.predicted_kl)} nats per token"
        + (f", corrected {number(corrected)}" if corrected is not None else ""),
    ]
    lines += [f"protected groups     {protected}"] if protected else []
    return "\n".join(lines)


def render_front(front: list[dict[str, Any]]) -> str:
    """The Pareto front as a table of at most 24 rows."""
    step = -(-len(front) // 24) or 1
    rows = [("bits per weight", "linear weights", "predicted KL", "corrected")]
    for row in front[::step]:
        corrected = row.get("predicted_kl_corrected")
        cells = (f"{row['bits_per_weight']:.3f}", size(row["linear_bytes"]), number(row["predicted_kl"]))
        rows.append((*cells, "" if corrected is None else number(corrected)))
    return table("Pareto front", rows)


def render_difference(difference: Difference) -> str:
    """What changed between two plans: the changes that move the price most, and the totals."""
    d = difference
    head = f"{len(d.changes)} of {d.decisions} groups differ"
    rows = [("group", "before", "after", "bytes", "nats")]
    for change in d.changes[:24]:
        formats = (change.before or "-", change.after or "-")
        rows.append((change.group, *formats, f"{change.bytes_delta:+,}", f"{change.nats_delta:+.3g}"))
    lines = [table(head, rows) if d.changes else head]
    lines += [f"... and {len(d.changes) - 24} more"] if len(d.changes) > 24 else []
    bits = " -> ".join(f"{value:.3f}" for value in d.bits_per_weight)
    lines += ["", f"bits per weight {bits}, {d.bytes_delta:+,} bytes, predicted KL {d.nats_delta:+.4g} nats per token"]
    return "\n".join(lines)


def number(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"
