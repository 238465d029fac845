"""A finished run whose model can be published."""

import io
import json
import shutil
from pathlib import Path

import pytest

from circuitpress.console import Console
from circuitpress.recipe import Recipe


@pytest.fixture(scope="session")
def published(tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of seconds on a checkpoint with a licence; only to be read."""
    from circuitpress.run import run_recipe

    checkpoint = tmp_path_factory.mktemp("hub") / "base"
    shutil.copytree(tiny_llama, checkpoint)
    (checkpoint / "LICENSE").write_text("Apache License\nVersion 2.0, January 2004\n")
    settings = {
        "data.calibration": str(text_file), "data.samples": 6, "data.length": 24, "evaluate.windows": 3,
        "quantize.group_size": 16, "plan.budget": "5bpw", "plan.formats": ["int2", "int4", "int8"], "plan.probes": [],
        "plan.swaps": 0, "score.exact": 0.0, "run.device": "cpu", "plan.protect": ["L0.head.1"],
    }  # fmt: skip
    lines = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    recipe = Recipe.parse(f"model: {checkpoint}", name="test", folder=Path("/"), overrides=lines)
    out = tmp_path_factory.mktemp("hub-runs") / "tiny"
    run_recipe(recipe, out, Console(err=io.StringIO(), out=io.StringIO()))
    return out
