"""Runs the scripts of this folder in processes of their own and reads the json lines that they print."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def lines(script: str, *arguments: str, **variables: str) -> list[dict[str, Any]]:
    """What the script printed; `variables` are added to its environment."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
