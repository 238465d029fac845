"""Runs jobs one after another, each by its adapter: `python -m peers job.json [job.json ...]`.

Several in one process, since importing a peer takes up to a minute. Each writes `weights.safetensors` (float32
[rows, cols] by module name, only what the peer changed) and then `result.json` into its job's folder. The result of an
adapter that fails is its error; the traceback goes to stderr, which is the log.
"""

import argparse
import importlib
import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file

from .protocol import Job, Kept, kept_as_json, versions


def main() -> int:
    """Runs the jobs and leaves the process with 0, or with 1 if an adapter failed."""
    parser = argparse.ArgumentParser(prog="python -m peers")
    parser.add_argument("jobs", type=Path, nargs="+")
    failed = [path for path in parser.parse_args().jobs if not _run(path)]
    # Some peers leave worker threads behind that keep the interpreter alive.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if failed else 0)


def _run(path: Path) -> bool:
    """Does one job; whether it went well."""
    document = json.loads(path.read_text())
    folder = path.parent
    torch.set_num_threads(document["threads"])
    fields = ("checkpoint", "ids", "bits", "group_size", "options", "matrices")
    job = Job(**{name: document[name] for name in fields}, scratch=str(folder / "scratch"))
    result: dict[str, Any] = {"error": None}
    try:
        kept = _load(document["adapter"]).quantize(job)
        _check(kept, job)
        save_file(
            {name: entry.weight.float().contiguous().clone() for name, entry in kept.items()},
            folder / "weights.safetensors",
        )
        result |= {"bytes": kept_as_json(kept, job)}
    except Exception as error:
        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {error}".strip()[:600]
    result |= {"seconds": job.seconds, "cpu_seconds": job.cpu_seconds, "notes": job.notes}
    result["versions"] = versions(document["versions"])
    partial = folder / "result.json.partial"
    partial.write_text(json.dumps(result, indent=1))
    partial.replace(folder / "result.json")
    return result["error"] is None


def _load(adapter: str) -> ModuleType:
    if not adapter.endswith(".py"):
        return importlib.import_module(f".{adapter}", __package__)
    spec = importlib.util.spec_from_file_location("adapter", adapter)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check(kept: dict[str, Kept], job: Job) -> None:
    for name, entry in kept.items():
        if tuple(entry.weight.shape) != tuple(job.matrices[name]):
            raise ValueError(f"{name} came back as {tuple(entry.weight.shape)}, it is {tuple(job.matrices[name])}")
        if not bool(entry.weight.isfinite().all()):
            raise ValueError(f"{name} came back with NaN or infinity")


if __name__ == "__main__":
    main()
