"""Runs scripts of this folder and of benchmarks/ in processes of their own and reads the json lines that they print.

A process of its own, because Triton's interpreter is chosen when a kernel is decorated, because under the interpreter
kernels cannot be compiled, and because the type checks that tests put around every function would reach into them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_BENCHMARKS = _HERE.parents[1] / "benchmarks"


def lines(script: str, *arguments: str, **variables: str) -> list[dict[str, Any]]:
    """What the script printed; `variables` are added to its environment."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(path for path in (*sys.path, str(_BENCHMARKS)) if path)}
    folder = _HERE if (_HERE / script).exists() else _BENCHMARKS
    command = [sys.executable, str(folder / script), *arguments]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
