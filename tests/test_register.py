"""`import circuitpress` teaches transformers our checkpoints, whichever comes first, and costs nothing before."""

import subprocess
import sys

import pytest

CHECK = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert "circuitpress" in AUTO_QUANTIZER_MAPPING and "circuitpress" in AUTO_QUANTIZATION_CONFIG_MAPPING
"""


def run(code: str) -> None:
    """Runs `code` in a new interpreter: what is imported first is the point here."""
    done = subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import circuitpress; from transformers import AutoModelForCausalLM",
        "import transformers, circuitpress; from transformers import AutoModelForCausalLM",
        "from transformers.quantizers import auto; import circuitpress",
    ],
)
def test_the_method_is_registered_whatever_is_imported_first(imports: str) -> None:
    run(imports + CHECK)


def test_the_import_alone_loads_neither_torch_nor_transformers() -> None:
    run(
        "import sys, circuitpress, circuitpress.errors\n"
        "assert circuitpress.__version__\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )


def test_one_finder_waits_and_leaves_when_its_work_is_done() -> None:
    run(
        "import sys, importlib, circuitpress\n"
        "waiting = lambda: [f for f in sys.meta_path if type(f).__module__ == 'circuitpress._register']\n"
        "importlib.reload(circuitpress)\n"
        "assert len(waiting()) == 1\n"
        "import transformers.quantizers\n"
        "assert not waiting()\n"
        "importlib.reload(circuitpress)\n"
        "assert not waiting()\n" + CHECK
    )


def test_other_packages_named_alike_are_left_alone() -> None:
    run(
        "import sys, circuitpress\n"
        "finder = sys.meta_path[0]\n"
        "assert finder.find_spec('transformers', None) is None\n"
        "assert finder.find_spec('quantizers', None) is None and finder in sys.meta_path\n"
    )
