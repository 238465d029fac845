"""One virtual environment for every set of peers whose requirements agree, made on first use and kept.

Peers pin each other's dependencies apart (llm-compressor wants transformers 5.17, GPTQModel another numpy), and ours
must stay what CI tests, so none of them is ever installed beside circuitpress. torch goes first, in our own version,
so that nothing else decides which build is taken; pip's own settings (PIP_INDEX_URL, pip.conf) are respected. An
environment is whole when the pinned versions are found in it: an interrupted installation is simply gone on with.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

from ..console import Advance, ignore
from ..errors import CircuitpressError
from ..files import write_bytes_atomic

log = logging.getLogger(__name__)

VARIABLE = "CIRCUITPRESS_PEERS"
"""Where the environments lie; by default ~/.cache/circuitpress/peers."""

NO_VARIABLES: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Environment:
    """Pinned requirements `name==version`; `late` ones are built against torch, without pip's build isolation.

    Jobs of a `shared` environment run in one process: they take a second each, the imports a minute.
    """

    name: str
    requirements: tuple[str, ...]
    late: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=lambda: NO_VARIABLES)
    shared: bool = False

    @property
    def pins(self) -> dict[str, str]:
        """Version by distribution of all that is pinned."""
        return dict(pin.split("==") for pin in (*self.requirements, *self.late) if "==" in pin)


ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        Environment("auto-round", ("auto-round==0.16.1", "accelerate", "safetensors")),
        Environment(
            "light",
            (
                "hqq==0.2.8.post1",
                "torchao==0.18.0",
                "optimum-quanto==0.2.7",
                "bitsandbytes==0.50.2",
                "gguf==0.19.0",
                "accelerate",
                "safetensors",
                "ninja",
                "setuptools",
            ),
            shared=True,
        ),
        # Compiles llama.cpp: it wants a C++ compiler, and a quarter of an hour of one core.
        Environment(
            "llama-cpp",
            ("llama-cpp-python==0.3.36", "gguf==0.19.0", "transformers", "accelerate", "safetensors"),
            shared=True,
        ),
        Environment("llmcompressor", ("llmcompressor==0.14.0.1", "accelerate", "safetensors")),
        Environment(
            "gptqmodel",
            ("optimum==2.3.0", "accelerate", "safetensors", "setuptools", "wheel", "ninja"),
            late=("gptqmodel==7.6.0",),
            # Its pools refuse a machine of two cores otherwise.
            variables=MappingProxyType({"GPTQMODEL_CPU_WORKERS": "2"}),
            shared=True,
        ),
    )
}


def peers_folder() -> Path:
    """Where environments are kept unless the user says otherwise."""
    chosen = os.environ.get(VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "circuitpress" / "peers"


def ensure(environment: Environment, folder: Path, *, advance: Advance = ignore) -> Path:
    """The interpreter of an environment under `folder`, which is made or completed if need be (minutes, gigabytes).

    Raises CircuitpressError with the end of pip's output if that fails.
    """
    home = folder / environment.name
    python = home / "bin" / "python"
    if _is_whole(python, environment):
        return python
    advance(0, f"installing {environment.name}")
    if not python.exists():
        # The base interpreter: a virtual environment of a virtual environment would break with the outer one.
        _call([getattr(sys, "_base_executable", sys.executable), "-m", "venv", str(home)], environment)
    torch = f"torch=={version('torch').partition('+')[0]}"
    write_bytes_atomic(home / "constraints.txt", f"{torch}\n".encode())
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _call([*pip, torch], environment)
    _call([*pip, "-c", str(home / "constraints.txt"), *environment.requirements], environment)
    if environment.late:
        late = ["--no-build-isolation", *environment.late]
        _call([*pip, "-c", str(home / "constraints.txt"), *late], environment)
    if not _is_whole(python, environment):
        raise CircuitpressError(
            f"{home}: pip reports success, but the pinned versions are not there", hint=f"remove {home} and try again"
        )
    return python


def _is_whole(python: Path, environment: Environment) -> bool:
    if not python.exists():
        return False
    code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    command = [str(python), "-c", code, "torch", *environment.pins]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return False
    found = json.loads(done.stdout)
    del found["torch"]
    return found == environment.pins


def _call(command: list[str], environment: Environment) -> None:
    log.info("%s", " ".join(command))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CircuitpressError(
            f"the environment {environment.name} cannot be made: {done.stderr.strip()[-400:] or done.stdout[-400:]}",
            hint=f"check the network and pip's settings; or leave it out of --peers or --baseline; or set {VARIABLE}",
        )
