"""What the tests of runs share: a recipe for seconds, a finished run, and copies of it to work on."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from circuitpress.console import Console
from circuitpress.files import sha256
from circuitpress.recipe import Recipe

SETTINGS = {
    "data.samples": 6,
    "data.length": 24,
    "evaluate.windows": 3,
    "quantize.group_size": 16,
    "plan.budget": "5bpw",
    "plan.formats": ["int2", "int4", "int8", "dense"],
    "plan.probes": ["int3", "int8"],
    "plan.swaps": 12,
    "score.exact": 0.05,
    "run.device": "cpu",
    # Runs are to be the same on machines with and without fast bfloat16.
    "run.dtype": "float32",
}
WORK = ("price.price", "probe.exact", "probe.probe", "score.variants.measure_windows", "apply.apply")
WORK += ("evaluate.fidelity",)

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def make_recipe() -> MakeRecipe:
    """`make_recipe(model, text, **{"plan.budget": "4bpw"})`."""

    def make(model: Path, text: Path, **changes: Any) -> Recipe:
        settings = SETTINGS | {"data.calibration": str(text)} | changes
        overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        return Recipe.parse(f"model: {model}", name="test", folder=Path("/"), overrides=overrides)

    return make


@pytest.fixture(scope="session")
def recipe(make_recipe: MakeRecipe, tiny_llama: Path, text_file: Path) -> Recipe:
    return make_recipe(tiny_llama, text_file)


@pytest.fixture
def console() -> Console:
    return Console(err=io.StringIO(), out=io.StringIO())


@pytest.fixture(scope="session")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests work on copies."""
    from circuitpress.run import run_recipe

    out = tmp_path_factory.mktemp("runs") / "tiny"
    run_recipe(recipe, out, Console(err=io.StringIO(), out=io.StringIO()))
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="session")
def digests() -> Callable[[Path], dict[str, str]]:
    """The digest of every file of a folder."""
    return lambda folder: {path.name: sha256(path) for path in sorted(folder.iterdir())}


@pytest.fixture
def forbid(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`forbid("price.price")` makes that function of the library fail when it is called; without a name, all work."""

    def forbid_names(*names: str) -> None:
        for name in names or WORK:

            def fail(*_: object, name: str = name, **__: object) -> None:
                raise AssertionError(f"{name} ran again")

            monkeypatch.setattr(f"circuitpress.{name}", fail)

    return forbid_names
