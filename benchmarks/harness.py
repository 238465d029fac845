"""Do lm-evaluation-harness's own command line and `circuitpress eval --tasks` give the same scores?

For every run folder, the original and its compressed model on the same tasks, both ways; a row for each task and metric
with the two scores. Both commands run in processes of their own.

    python benchmarks/harness.py --run runs/4bit --run runs/3bit --tasks local_blimp,local_lambada \\
        --include recipes/tasks --task-data DIR
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import yaml

from common import load_rows, save_results

_FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


@click.command()
@click.option("--run", "runs", type=_FOLDER, multiple=True, required=True)
@click.option("--tasks", required=True)
@click.option("--include", type=_FOLDER, required=True)
@click.option("--task-data", type=_FOLDER, required=True)
@click.option("--limit", type=int, help="documents of each task")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/harness.json"))
def main(
    runs: tuple[Path, ...], tasks: str, include: Path, task_data: Path, limit: int | None, out: Path
) -> None:  # fmt: skip
    """Runs both and writes the rows."""
    options = [] if limit is None else ["--limit", str(limit)]
    dense: dict[Path, dict[tuple[str, str], float]] = {}
    for run in runs:
        reference = Path(yaml.safe_load((run / "recipe.yaml").read_text())["model"])
        ours = _ours(run / "model", tasks, include, task_data, options)
        if reference not in dense:
            dense[reference] = _theirs(reference, tasks, include, task_data, options)
        compressed = _theirs(run / "model", tasks, include, task_data, options)
        rows = [
            {
                "checkpoint": reference.name,
                "model": model,
                "bits_per_weight": ours["bits_per_weight"] if model == "compressed" else None,
                "task": row["task"],
                "metric": row["metric"],
                "lm_eval": theirs[row["task"], row["metric"]],
                "eval": row[column],
                "documents": row["documents"],
                "limit": limit,
            }
            for model, column, theirs in (
                ("original", "reference", dense[reference]),
                ("compressed", "value", compressed),
            )
            for row in ours["tasks"]
        ]
        keep = [row for row in load_rows(out) if not _same(row, rows[0], ours["bits_per_weight"])]
        save_results(out, keep + rows)
        gap = max(abs(row["eval"] - row["lm_eval"]) / max(abs(row["lm_eval"]), 1e-9) for row in rows)
        click.echo(f"{run.name}: {len(rows)} scores, largest relative difference {gap:.2g}")


def _same(row: dict[str, Any], other: dict[str, Any], bits: float) -> bool:
    mine = row["checkpoint"] == other["checkpoint"]
    return mine and (row["model"] == "original" or row["bits_per_weight"] == bits)


def _ours(model: Path, tasks: str, include: Path, data: Path, options: list[str]) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "circuitpress",
        "eval",
        str(model.resolve()),
        "--tasks",
        tasks,
        "--json",
        "--quiet",
    ]
    command += ["--include", str(include.resolve()), "--task-data", str(data.resolve()), *options]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _theirs(model: Path, tasks: str, include: Path, data: Path, options: list[str]) -> dict[tuple[str, str], float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "circuitpress", "lm-eval", "--model", "circuitpress", "--device", "cpu"]
        command += ["--model_args", f"pretrained={model.resolve()}", "--tasks", tasks, "--batch_size", "16"]
        command += ["--include_path", str(include.resolve()), "--output_path", folder, *options]
        subprocess.run(command, check=True, capture_output=True, cwd=data)
        (file,) = Path(folder).rglob("results*.json")
        document = json.loads(file.read_text())
    found = {}
    for task, entry in (document["results"] | document.get("groups", {})).items():
        for key, value in entry.items():
            metric, _, chosen = key.partition(",")
            if chosen == "none" and isinstance(value, (int, float)) and not metric.endswith("_stderr"):
                found[task, metric] = float(value)
    return found


if __name__ == "__main__":
    main()
