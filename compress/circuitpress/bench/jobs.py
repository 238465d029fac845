"""Running peers: a job is one setting of one peer on one checkpoint, done in a process of the peer's environment.

Its folder is named by a digest of everything that decides its result (weights, tokens, setting, pinned versions), so a
rerun finds what is done and only judges it. What failed is tried again.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from ..anatomy import Anatomy
from ..console import Advance, ignore
from ..files import sha256, write_bytes_atomic
from .environments import Environment
from .padding import neurons_to_pad, padded_shape, write_padded

log = logging.getLogger(__name__)

HOME = Path(__file__).parent
"""What goes on the path of a peer's process: the folder that holds `peers`."""


@dataclass(frozen=True)
class Setting:
    """One way to run one peer.

    `adapter` is a module of `peers`, or a file; `label` tells settings of one peer and width apart; `padded` asks for
    neurons padded to a multiple of 32 (see padding.py).
    """

    method: str
    label: str
    adapter: str
    environment: str
    bits: int
    group_size: int
    options: Mapping[str, Any] = field(default_factory=dict)
    padded: bool = False

    @property
    def budget(self) -> str:
        """What a table calls this row: `3 bits, g64 asym`."""
        return f"{self.bits} bits, {self.label}"


@dataclass(frozen=True)
class Outcome:
    """What a method made of a checkpoint: decoded weights on disk, and what they cost.

    `weights` is a file with float32 [rows, cols] by module name for every matrix that changed, or the folder of a whole
    model (None if the method failed, then `error` says why); `linear_bytes` are all bytes that its format keeps for the
    linear matrices, `other_bytes` those of everything else where they differ from the original's.
    """

    method: str
    budget: str
    weights: Path | None
    linear_bytes: int
    seconds: float
    cpu_seconds: float
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    error: str | None = None
    other_bytes: int | None = None


def checkpoint_digest(folder: Path) -> str:
    """Hex digest of a checkpoint's config and weights."""
    parts = [sha256(path) for path in sorted([folder / "config.json", *folder.glob("*.safetensors")])]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def run_peers(
    settings: Sequence[Setting], anatomy: Anatomy, ids: Path, *, environment: Environment, python: Path, work: Path,
    threads: int, timeout: float, advance: Advance = ignore,
) -> list[Outcome]:  # fmt: skip
    """Runs settings of one environment, or finds them done under `work`. Failures come back as outcomes with an error.

    `ids` is a safetensors file with the calibration tokens `ids` int64 [windows, length]; `timeout` are the seconds
    that one job may take. A second process that wants jobs of the same environment in the same `work` waits.
    """
    with _alone(work / f".{environment.name}.lock"):
        return _run(settings, anatomy, ids, environment, python, work, threads, timeout, advance)


def _run(
    settings: Sequence[Setting], anatomy: Anatomy, ids: Path, environment: Environment, python: Path, work: Path,
    threads: int, timeout: float, advance: Advance,
) -> list[Outcome]:  # fmt: skip
    jobs = [_Job.make(setting, anatomy, ids, environment, work, threads) for setting in settings]
    waiting = [job for job in jobs if not job.is_done]
    for job in waiting:
        job.write(anatomy, ids, work)
    advance(len(jobs) - len(waiting), f"{environment.name}: {len(jobs) - len(waiting)} jobs done before")
    while waiting:
        now = waiting if environment.shared else waiting[:1]
        advance(0, f"{environment.name}: {', '.join(dict.fromkeys(job.setting.method for job in now))}")
        error = _call(now, python, environment, threads, timeout * len(now))
        done = [job for job in now if job.has_result]
        if len(done) < len(now):  # the process died in the first of those that are left
            victim = next(job for job in now if not job.has_result)
            write_bytes_atomic(victim.folder / "result.json", json.dumps({"error": error}).encode())
            done.append(victim)
        for job in done:
            shutil.rmtree(job.folder / "scratch", ignore_errors=True)
        waiting = [job for job in waiting if job not in done]
        advance(len(done), environment.name)
    return [job.outcome() for job in jobs]


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Holds the lock file `path`; the kernel lets go of it however the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class _Job:
    """A setting on a checkpoint: its folder, and what its job.json will say beside where things lie."""

    setting: Setting
    folder: Path
    extra: int
    document: Mapping[str, Any]

    @classmethod
    def make(
        cls, setting: Setting, anatomy: Anatomy, ids: Path, environment: Environment, work: Path, threads: int
    ) -> Self:
        extra = neurons_to_pad(anatomy, 32) if setting.padded else 0
        digest = checkpoint_digest(anatomy.folder)
        matrices = {m.module: padded_shape(m, extra) for block in anatomy.blocks for m in block.matrices}
        document = asdict(setting) | {"digest": digest, "threads": threads, "extra_neurons": extra}
        document |= {"matrices": matrices, "versions": ["torch", "transformers", *environment.pins]}
        decides = document | {"ids": sha256(ids), "pins": environment.pins, "threads": None, "label": None}
        key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
        return cls(setting, work / "jobs" / f"{setting.method}-{setting.bits}-{key}", extra, document)

    @property
    def has_result(self) -> bool:
        return (self.folder / "result.json").exists()

    @property
    def is_done(self) -> bool:
        return self.has_result and json.loads((self.folder / "result.json").read_text())["error"] is None

    def write(self, anatomy: Anatomy, ids: Path, work: Path) -> None:
        """Makes the folder anew, with job.json in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        checkpoint = anatomy.folder
        if self.extra:
            checkpoint = write_padded(anatomy, self.extra, work / f"padded-{self.extra}-{self.document['digest'][:12]}")
        paths = {"checkpoint": str(checkpoint.resolve()), "ids": str(ids.resolve())}
        write_bytes_atomic(self.folder / "job.json", json.dumps({**self.document, **paths}, indent=1).encode())

    def outcome(self) -> Outcome:
        result = json.loads((self.folder / "result.json").read_text())
        setting = self.setting
        described: dict[str, Any] = {"bits": setting.bits, "group_size": setting.group_size, **setting.options}
        if self.extra:
            described["padded_neurons"] = self.extra
        if result.get("notes"):
            described["notes"] = sorted(set(result["notes"]))
        failed = result["error"] is not None
        return Outcome(
            method=setting.method,
            budget=setting.budget,
            weights=None if failed else self.folder / "weights.safetensors",
            linear_bytes=0 if failed else sum(result["bytes"].values()),
            seconds=result.get("seconds", 0.0),
            cpu_seconds=result.get("cpu_seconds", 0.0),
            settings=described,
            versions=result.get("versions", {}),
            error=result["error"],
        )


def _call(jobs: Sequence[_Job], python: Path, environment: Environment, threads: int, timeout: float) -> str:
    """Runs the adapters of `jobs` in one process, its output in the first one's log.txt; how it ended."""
    count = str(threads)
    variables = dict(os.environ) | {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
    # Local folders only: a peer that looks a name up on the Hub would wait for a network that may not be there.
    variables |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    variables |= dict(environment.variables)
    command = [str(python), "-P", "-m", "peers", *(str((job.folder / "job.json").resolve()) for job in jobs)]
    log.info("%s", " ".join(command))
    path = jobs[0].folder / "log.txt"
    with path.open("wb") as output:
        try:
            done = subprocess.run(
                command, cwd=jobs[0].folder, env=variables, stdout=output, stderr=subprocess.STDOUT, timeout=timeout,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"stopped after {timeout:.0f} s"
    tail = path.read_text(errors="replace").strip().splitlines()[-1:]
    return f"the process ended with code {done.returncode} and no result: {''.join(tail)[-300:]}"
