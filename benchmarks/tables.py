"""Writes the tables of the documents from benchmarks/results/*.json, so that no figure is typed by hand.

python benchmarks/tables.py           # rewrites the marked blocks of README.md and docs/measurements.md
python benchmarks/tables.py --check   # exits 1 if they differ
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from circuitpress.bench import cells
from circuitpress_kernels.slices import BOOK, DENSE, TRELLIS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "measurements.md")
Rows = list[dict[str, Any]]


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; exit 1 if a document is out of date.")
def main(check: bool) -> None:
    """Brings the tables of the documents up to date."""
    for path in DOCUMENTS:
        before = path.read_text()
        after = fill(before)
        if check and after != before:
            raise SystemExit(f"{path.name} does not show benchmarks/results: run python benchmarks/tables.py")
        if not check:
            path.write_text(after)


def fill(text: str) -> str:
    """`text` with the body of every block `<!-- results:NAME --> ... <!-- end -->` made anew."""
    for name, build in BLOCKS.items():
        block = re.compile(rf"(<!-- results:{name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = block.sub(lambda found, build=build: found[1] + build() + found[2], text)
    return text


def quality() -> str:
    """Our models beside the best peers at no more bytes, one line for each checkpoint, text and band of bits."""
    rows = _rows("quality.json")
    lines = []
    for cell in cells(rows):
        if cell.best is None:
            continue
        ours = "" if cell.ours_kl is None else f"**{cell.ours_kl:.4g}** at {cell.ours_bits:.2f}"
        ratios = [f"{value:.2f}" if value is not None else "" for value in (cell.ratio, cell.worst)]
        best = f"{cell.best}: {cell.best_kl:.4g} at {cell.best_bits:.2f}"
        lines.append([cell.checkpoint, cell.text, f"{cell.band[0]:g} to {cell.band[1]:g}", best, ours, *ratios])
    head = ["checkpoint", "text", "bits", "best peer: KL at real bits", "circuitpress", "ratio"]
    return _table([*head, "worst against any peer"], lines)


def steps() -> str:
    """KL of the full method and without each of its steps."""
    rows = _rows("steps.json")
    budgets = [budget for (budget,) in _keys(rows, "budget")]
    lines = []
    for checkpoint, method in _keys(rows, "checkpoint", "method"):
        cells = []
        for budget in budgets:
            mine, full = (
                _mean(rows, "kl", checkpoint=checkpoint, budget=budget, method=name) for name in (method, "full")
            )
            change = "" if method == "full" else f" ({_change(mine, full)})"
            cells.append("" if np.isnan(mine) else f"{mine:.4g}{change}")
        lines.append([checkpoint, method, *cells])
    return _table(["checkpoint", "method", *budgets], lines)


def pruning() -> str:
    """Which units leave: our selection beside magnitude and Wanda, all compensated."""
    rows = [row for row in _rows("pruning.json") if row["part"] == "selection"]
    methods = ("circuitpress", "control:wanda", "control:magnitude", "control:random", "circuitpress, not compensated")
    lines = []
    for checkpoint, what, fraction in _keys(rows, "checkpoint", "what", "fraction"):
        kl = [_mean(rows, "kl", checkpoint=checkpoint, what=what, fraction=fraction, method=name) for name in methods]
        left = _mean(rows, "weights_left", checkpoint=checkpoint, what=what, fraction=fraction)
        lines.append([checkpoint, f"{fraction:.0%} of {what}", f"{left:.1%}", *(f"{value:.4g}" for value in kl)])
    head = ["checkpoint", "what leaves", "weights left", "circuitpress", "Wanda", "magnitude", "random"]
    return _table([*head, "not compensated"], lines)


def joint() -> str:
    """One budget spent by bits alone, by removal alone, and by the search over both."""
    rows = [row for row in _rows("pruning.json") if row["part"] == "joint"]
    lines = []
    for checkpoint, budget in _keys(rows, "checkpoint", "budget"):
        cells = []
        for method in ("bits alone", "pruning alone", "joint"):
            found = _select(rows, checkpoint=checkpoint, budget=budget, method=method)
            # A row without a figure says which bits the smallest plan takes; no row, that no removal alone fits.
            cells.append("no plan fits" if not found or found[0]["kl"] is None else f"{found[0]['kl']:.4g}")
        (both,) = _select(rows, checkpoint=checkpoint, budget=budget, method="joint")
        widths = both.get("widths")
        stay = f"{widths['neurons']} neurons, {widths['kv_groups']} KV groups" if widths else "all"
        lines.append([checkpoint, budget, *cells, stay])
    return _table(["checkpoint", "budget", "bits alone", "pruning alone", "both", "what stays of a layer"], lines)


def calibration() -> str:
    """KL at 3 bits over the number of calibration tokens, and over their source."""
    rows = [row for row in _rows("calibration.json") if row["budget"] == "3.0bpw"]
    lines = [
        [checkpoint, source, f"{tokens:,}", test, f"{_mean(rows, 'kl', **key):.4g}"]
        for checkpoint, source, tokens, test in sorted(_keys(rows, "checkpoint", "calibration", "tokens", "test"))
        for key in [{"checkpoint": checkpoint, "calibration": source, "tokens": tokens, "test": test}]
    ]
    return _table(["checkpoint", "calibrated on", "tokens", "tested on", "KL at 3.0 bits"], lines)


def prediction() -> str:
    """Predictions against the measurement."""
    rows = _rows("prediction.json")
    lines = []
    for checkpoint, plan in _keys(rows, "checkpoint", "plan"):
        mine = _select(rows, checkpoint=checkpoint, plan=plan)
        errors = [row["predicted_kl_corrected"] / row["kl"] - 1 for row in mine]
        values = [np.mean([row[key] for row in mine]) for key in ("predicted_kl", "predicted_kl_corrected", "kl")]
        bits = max(row["bits_per_weight"] for row in mine)
        lines.append([checkpoint, f"{bits:.3f} of {plan}", *(f"{value:.4g}" for value in values)])
        lines[-1].append(f"{max(errors, key=abs):+.1%}")
    head = ["checkpoint", "bits per weight", "sum of prices", "corrected", "measured on test text"]
    return _table([*head, "worst error of the corrected"], lines)


def exact() -> str:
    """Prices against single interventions."""
    rows = _rows("exact.json")
    lines = []
    for (checkpoint,) in _keys(rows, "checkpoint"):
        mine = _select(rows, checkpoint=checkpoint)
        lines.append([checkpoint, str(len(mine)), f"{mine[0]['spearman']:.3f}", f"{mine[0]['median_ratio']:.2f}"])
    return _table(["checkpoint", "interventions", "Spearman", "median of measured / price"], lines)


def granularity() -> str:
    """One format a matrix against one a unit."""
    rows = _select(_rows("granularity.json"), plan="general")
    lines = []
    for checkpoint, budget in _keys(rows, "checkpoint", "budget"):
        by_matrix, by_unit = (
            _mean(rows, "kl", checkpoint=checkpoint, budget=budget, granularity=cut) for cut in ("matrix", "unit")
        )
        if np.isfinite(by_matrix) and np.isfinite(by_unit):
            change = _change(by_unit, by_matrix)
            lines.append([checkpoint, f"{budget:g}", f"{by_matrix:.4g}", f"{by_unit:.4g}", change])
    return _table(["checkpoint", "bits per weight", "KL, by matrix", "KL, by unit", "change"], lines)


def behavior() -> str:
    """The behavior that goes with each checkpoint, at the lowest budgets."""
    rows = _rows("granularity.json")
    lines = []
    for checkpoint, plan, budget in _keys(rows, "checkpoint", "plan", "budget"):
        if budget not in (2.5, 3.0):
            continue
        mine = _select(rows, checkpoint=checkpoint, plan=plan, budget=budget)
        by_matrix, by_unit = (
            _mean(rows, "metric", checkpoint=checkpoint, plan=plan, budget=budget, granularity=cut)
            for cut in ("matrix", "unit")
        )
        name, dense = mine[0]["behavior"], mine[0]["dense_metric"]
        lines.append([checkpoint, name, plan, f"{budget:g}", f"{dense:.3f}", f"{by_matrix:.3f}", f"{by_unit:.3f}"])
    return _table(["checkpoint", "behavior", "priced on", "bits", "dense", "by matrix", "by unit"], lines)


def protection() -> str:
    """Mean logit difference of a trained circuit when few of its parts stay dense, by how they were chosen."""
    rows = _rows("protection.json")
    columns = [("shared", "2-bit", heads) for heads in (1, 2, 3)]
    columns += [("whole", grid, 1) for grid in ("2-bit", "absmean", "ternary")]
    lines = []
    for (ranking,) in _keys(rows, "ranking"):
        mine, none = _select(rows, ranking=ranking), ranking == "none"
        kept = [_mean(mine, "compressed", setting=s, grid=g, heads=0 if none else n) for s, g, n in columns]
        lines.append([ranking.replace("_", " "), *(f"{value:.2f}" for value in kept)])
    lines.append(["(dense)", f"{np.mean([row['dense'] for row in rows]):.2f}", *[""] * 5])
    head = ["which heads stay", "1 head", "2 heads", "3 heads", "1 whole head", "absmean", "ternary"]
    return _table(head, lines)


def kept() -> str:
    """Behaviors with and without being named in the recipe."""
    rows = _rows("behaviors.json")
    lines = []
    for checkpoint, budget, refine, behavior in _keys(rows, "checkpoint", "budget", "refine", "behavior"):
        key = {"checkpoint": checkpoint, "budget": budget, "refine": refine, "behavior": behavior}
        plain, told = (_select(rows, **key, method=name)[0] for name in ("told nothing", "told to keep"))
        margins = [plain["reference_margin"], plain["margin"], told["margin"]]
        shares = [plain["reference_accuracy"], plain["accuracy"], told["accuracy"]]
        what = f"{behavior}, {refine} steps" if refine else behavior
        lines.append([checkpoint, what, budget, " / ".join(f"{value:.1%}" for value in shares)])
        lines[-1] += [" / ".join(f"{value:.2f}" for value in margins), _change(told["kl"], plain["kl"])]
        lines[-1].append(f"{plain['likeness']:.2f}" if "likeness" in plain else "")
    head = ["checkpoint", "behavior", "budget", "right: dense / told nothing / told to keep"]
    head += ["margin: dense / told nothing / told to keep", "KL on text", "likeness to text"]
    return _table(head, lines)


def spared() -> str:
    """Rounding that is told which SAE features matter, beside a control."""
    rows = _select(_rows("features.json"), part="rounding")
    names, lines = ("kl", "correlation_top", "survivors_top"), []
    for checkpoint, budget, method in _keys(rows, "checkpoint", "budget", "method"):
        means = [_mean(rows, name, checkpoint=checkpoint, budget=budget, method=method) for name in names]
        lines.append([checkpoint, budget, method, *(f"{value:.4g}" for value in means)])
    head = ["checkpoint", "budget", "rounded with", "KL", "costliest features: mean correlation"]
    return _table([*head, "share that survives"], lines)


def paths() -> str:
    """Side paths of low rank beside as many bytes of bits."""
    rows = _select(_rows("features.json"), part="side path")
    kinds, lines = ("bits", "no path", "random", "features", "eigenvectors", "best"), []
    for checkpoint, budget, rank, bits in _keys(rows, "checkpoint", "budget", "rank", "side_bits"):
        at = {"checkpoint": checkpoint, "budget": budget}
        mine = [*_select(rows, **at, method="bits"), *_select(rows, **at, rank=rank)]
        kl = [[_mean(mine, "kl", method=kind + more) for more in ("", ", rounded for it")] for kind in kinds]
        if rank:
            cells = [" / ".join(f"{value:.4g}" for value in pair if np.isfinite(value)) for pair in kl]
            lines.append([checkpoint, budget, f"{rank} ({bits:.2f} bits)", *cells])
    return _table(["checkpoint", "budget", "rank", "all bytes are bits", "unspent", *kinds[2:]], lines)


def clock() -> str:
    """CPU seconds beside other calibrated compressors."""
    rows = _rows("clock.json")
    lines = [[row["checkpoint"], row["method"], f"{row['cpu_seconds']:.1f}", f"{row['ratio']:.2f}"] for row in rows]
    return _table(["checkpoint", "method", "CPU seconds", "against the fastest other"], lines)


def speed() -> str:
    """Decode and prefill on a CPU."""
    lines = []
    for path in sorted(RESULTS.glob("speed-*.json")):
        for row in json.loads(path.read_text())["rows"]:
            if row["method"] != "dense bfloat16":
                what = f"{row['phase']}, batch {row['batch']}"
                ratio, memory = row["ratio_to_dense"], row["memory_ratio_to_dense"]
                lines.append([path.stem, row["method"], what, str(row["threads"]), f"{row['tokens_per_second']:.1f}"])
                lines[-1] += [f"{ratio:.2f}", f"{memory:.2f}"]
    head = ["machine", "method", "what", "threads", "tokens per second", "time against dense bfloat16"]
    return _table([*head, "weight memory against that"], lines)


def latency() -> str:
    """Plans within a time beside plans of as many bytes."""
    lines = []
    for row in _rows("latency.json"):
        if row["budget"] == "none":
            continue
        formats = ", ".join(f"{count} {name}" for name, count in row["formats"].items() if count)
        times = [f"{row[key] / 1000:.2f}" for key in ("planned_us", "measured_us")]
        change = _change(row["measured_us"], row["planned_us"])
        what = f"time: {row['share']:.0%} of 16-bit" if row["budget"] == "time" else "as many bytes"
        lines.append([row["checkpoint"], what, f"{row['bits_per_weight']:.2f}", *times, change, formats])
    head = ["model", "budget", "bits per weight", "planned, ms", "measured, ms", "off by", "matrices in each format"]
    return _table(head, lines)


def exports() -> str:
    """Every target, written and loaded by its own consumer."""
    lines = []
    for row in _rows("export.json"):
        kl = f"{row['kl_planned']:.4g} (stand-ins)" if row["kl"] is None else f"{row['kl']:.4g}"
        sizes = [f"{row['bits_per_weight']:.2f}", f"{row['file_bytes']:,}", f"{row['max_logit_error']:.2g}"]
        lines.append([row["checkpoint"], row["target"], *sizes, kl])
    head = ["checkpoint", "target", "bits per weight", "file bytes", "largest logit error", "KL to the original"]
    return _table(head, lines)


def floats() -> str:
    """Does llama.cpp's float32 model compute what transformers does?"""
    lines = []
    for row in _select(_rows("llama-cpp.json"), method="float32"):
        both = [f"{row[key]:.4f}" for key in ("perplexity", "transformers_perplexity")]
        same = "yes" if row["same_tokens"] else "no"
        lines.append([row["checkpoint"], same, *both, f"{row['kl_to_transformers']:.1g}"])
    return _table(["checkpoint", "same tokens", "perplexity in llama.cpp", "in transformers", "KL between them"], lines)


def mixtures() -> str:
    """Plans beside llama.cpp's own mixtures of types, as llama.cpp measures them."""
    rows = [row for row in _rows("llama-cpp.json") if row.get("importance") is not None]
    lines = []
    for checkpoint, bits, method in sorted(_keys(rows, "checkpoint", "bits_per_weight", "method")):
        mine = _select(rows, checkpoint=checkpoint, bits_per_weight=bits, method=method)
        (told,), (plain,) = (_select(mine, importance=wanted) for wanted in (True, False))
        kl = [f"{row['kl']:.4g}" for row in (plain, told, told["decoded"])]
        kl.append(f"{told['stand_ins']['kl']:.4g}" if "stand_ins" in told else "")
        lines.append([checkpoint, f"{bits:.2f}", method, *kl])
    head = ["checkpoint", "bits per weight", "types", "KL without importance matrix", "with ours"]
    return _table([*head, "that, decoded, in transformers", "formats that stand in"], lines)


def harness() -> str:
    """The same tasks by the harness's own command line and by `eval --tasks`."""
    rows = _rows("harness.json")
    lines = []
    for checkpoint, model, bits in _keys(rows, "checkpoint", "model", "bits_per_weight"):
        mine = _select(rows, checkpoint=checkpoint, model=model, bits_per_weight=bits)
        gap = max(abs(row["eval"] - row["lm_eval"]) for row in mine)
        name = model if bits is None else f"{model}, {bits:.2f} bits"
        for row in mine:
            if "::" not in row["task"]:
                task = f"{row['task']} {row['metric']}"
                lines.append([f"{checkpoint}, {name}", task, f"{row['lm_eval']:.6g}", f"{row['eval']:.6g}"])
                lines[-1].append(f"{gap:.2g} in {len(mine)}")
    return _table(["model", "task", "lm-eval", "eval --tasks", "largest difference of all scores"], lines)


def aot() -> str:
    """What the compiler makes of the kernels for uniform integers on an H100 or H200."""
    rows = [row for row in _rows("kernels-aot.json") if row["target"] == "sm_90" and row["kernel"] == "slice_pieces"]
    lines = []
    for row in rows:
        if len(row["kinds"]) == 1 and row.get("budget") is not None:
            cost = f"{row['instructions_per_weight']:.2f} of {row['budget']:.2f}"
            kind = f"{_kind(row['kinds'][0])}, {row['type']}"
            lines.append([kind, cost, str(row["registers"]), str(row["spills"]), f"{row['shared']:,}"])
    head = ["weights", "instructions a weight, of the budget", "registers", "bytes spilled", "shared memory"]
    return _table(head, lines)


def _kind(kind: int) -> str:
    """The kernels' number of a kind of weights in words (circuitpress_kernels/slices.py)."""
    if kind > TRELLIS:
        return f"trellis, {(kind - TRELLIS) / 2:g} bits"
    if kind > BOOK:
        return f"codebook, {kind - BOOK} bits"
    return f"{kind} bits" if kind < DENSE else "16-bit floating"


def memory() -> str:
    """Peak memory of pricing a model block by block."""
    lines = []
    for row in _rows("memory.json"):
        sizes = [row[f"{name}_bytes"] for name in ("peak", "block", "embedding", "saved_input", "rest")]
        lines.append([row["model"], str(row["tokens"]), f"{row['seconds']:.0f}", *(f"{n / 1e6:.0f} MB" for n in sizes)])
    head = ["model", "tokens", "seconds", "peak resident", "one block", "embeddings", "saved inputs", "all the rest"]
    return _table(head, lines)


def kv() -> str:
    """KL of packed key-value caches, at the bytes of the uniform one with 4 bits and of that with 8."""
    rows = [row for row in _rows("kv.json") if "checkpoint" in row]
    methods = ("uniform 8", "planned, bytes of 8", "uniform 4", "planned, bytes of 4", "control:shuffled, bytes of 4")
    methods += ("transformers quanto 4, groups of 64",)
    lines = []
    for checkpoint, tokens, context in _keys(rows, "checkpoint", "tokens", "context"):
        kl = [_mean(rows, "kl", checkpoint=checkpoint, tokens=tokens, method=name) for name in methods]
        lines.append([checkpoint, f"{tokens:,} of {context:,}"])
        lines[-1] += ["" if np.isnan(value) else f"{value:.2g}" for value in kl]
    head = ["checkpoint", "tokens, of those it knows", "uniform 8", "planned at its bytes", "uniform 4"]
    return _table([*head, "planned at its bytes", "that plan, heads shuffled", "transformers, quanto 4"], lines)


BLOCKS: dict[str, Callable[[], str]] = {build.__name__: build for build in (
    quality, steps, pruning, joint, calibration, prediction, exact, granularity, behavior, protection, kept, spared,
    paths, clock, speed, memory, latency, kv, exports, floats, mixtures, harness, aot,
)}  # fmt: skip


def _rows(name: str) -> Rows:
    return json.loads((RESULTS / name).read_text())["rows"]


def _select(rows: Rows, **wanted: Any) -> Rows:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _mean(rows: Rows, value: str, **wanted: Any) -> float:
    found = [row[value] for row in _select(rows, **wanted)]
    return float(np.mean(found)) if found else float("nan")


def _keys(rows: Rows, *names: str) -> Iterable[tuple[Any, ...]]:
    return dict.fromkeys(tuple(row[name] for name in names) for row in rows)


def _change(new: float, old: float) -> str:
    return f"{new / old - 1:+.1%}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(head)
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, rule, *lines])


if __name__ == "__main__":
    main()
