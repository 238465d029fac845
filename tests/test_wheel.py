"""What the wheel brings to a user's site-packages, and what the repository brings to a user who stands in it.

Two top-level names and no more: a wheel with a top-level `kernels` overwrites Hugging Face's package of that name, and
a folder `kernels` with an `__init__.py` in the current directory hides it; both end in `import transformers` failing on
the machines that have it, and only there.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"circuitpress": ROOT / "compress", "circuitpress_kernels": ROOT / "kernels"}

# Stands for Hugging Face's package: any name can be imported from it, as from a version that transformers accepts.
KERNELS = """
from unittest.mock import MagicMock
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock()
"""


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of all files in a freshly built wheel."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    assert wheel.name == "circuitpress-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_top_level_names(names: set[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)


def test_every_file_of_the_packages_is_in_the_wheel(names: set[str]) -> None:
    expected = {
        path.relative_to(root).as_posix()
        for package, root in PACKAGES.items()
        for path in (root / package).glob("**/*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected <= names
    assert {"circuitpress/text/default.txt", "circuitpress/text/SOURCES.md"} <= names
    assert {"circuitpress/py.typed", "circuitpress_kernels/py.typed"} <= names


def test_transformers_imports_from_the_repository_root() -> None:
    _python("from transformers import LlamaForCausalLM")


def test_transformers_imports_from_the_repository_root_beside_hugging_face_kernels(tmp_path: Path) -> None:
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(KERNELS)
    info = tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    _python(
        "import kernels; from transformers import LlamaForCausalLM, utils\n"
        f"assert utils.is_kernels_available() and kernels.__file__.startswith({str(tmp_path)!r})",
        path=tmp_path,
    )


def _python(code: str, *, path: Path | None = None) -> None:
    """Runs `code` in a new interpreter that stands in the repository's root."""
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
