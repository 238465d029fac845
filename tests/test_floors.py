"""Holds the plan of the house: who may import whom, read from the syntax tree of every file.

A room (a module or a sub-package of circuitpress) imports only from floors below its own, and from a neighbour only
along an arrow of `ARROWS`. Imports inside functions count as well. To add a room, give it a floor; to let a room use
its neighbour, add an arrow, and mind that the arrows of one floor must not form a circle.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "compress" / "circuitpress"
KERNELS = ROOT / "kernels" / "circuitpress_kernels"

FLOORS = (
    ("units", "fields", "files", "errors", "formats", "interrupt", "menu", "recipe", "console", "yamltext"),
    ("stream", "hooks", "anatomy", "assemble", "behaviors", "bnb", "checkpoint", "data", "store", "widths"),
    ("segments", "mech", "score", "quantize", "prune", "evaluate", "runtime"),
    (
        *("apply", "refine", "audit", "outer", "features", "lean"),
        *("margins", "price", "plan", "prefix", "probe", "rounding"),
    ),
    ("run", "report", "export", "hub", "bench"),
    (
        *("cli", "auditing", "caching", "circuitry", "command", "evaluating"),
        *("exporting", "microscope", "publishing", "__main__"),
    ),
)
ARROWS = {
    "files": {"errors"},
    "units": {"errors", "files"},
    "formats": {"errors", "units"},
    "recipe": {"errors", "fields", "files", "menu", "yamltext"},
    "fields": {"menu"},
    "yamltext": {"errors"},
    "console": {"errors"},
    "anatomy": {"checkpoint"},
    "checkpoint": {"bnb"},
    "assemble": {"anatomy", "checkpoint"},
    "widths": {"anatomy"},
    "hooks": {"anatomy"},
    "stream": {"anatomy", "checkpoint", "hooks", "store"},
    "evaluate": {"runtime"},
    "score": {"evaluate", "quantize", "runtime", "segments"},
    "mech": {"evaluate", "score"},
    "prune": {"score"},
    "features": {"price"},
    "price": {"outer"},
    "lean": {"price"},
    "margins": {"lean", "price", "rounding"},
    "apply": {"lean", "outer", "prefix", "price", "rounding"},
    "prefix": {"lean", "price", "rounding"},
    "rounding": {"lean", "price"},
    "probe": {"lean", "outer", "prefix", "price", "rounding"},
    "run": {"report", "export"},
    "bench": {"run"},
    "hub": {"report"},
    "auditing": {"command"},
    "caching": {"command"},
    "circuitry": {"command"},
    "evaluating": {"command"},
    "exporting": {"command"},
    "publishing": {"command"},
    "microscope": {"command"},
    "cli": {"auditing", "caching", "circuitry", "command", "evaluating", "exporting", "microscope", "publishing"},
    "__main__": {"cli"},
}
# The package itself loads one private module, which sees the runtime only when transformers is there.
PACKAGE = {"__init__": {"_register"}, "_register": {"runtime"}}
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TORCH_FREE = ("units", "files", "errors", "recipe", "console", "anatomy", "plan", "report", "cli", "command")
USES_KERNELS = {"runtime", "formats", "quantize", "bench"}
MOST_LINES = 400


def files() -> list[Path]:
    """Every Python file of the project."""
    return sorted(
        path for folder in ("compress", "kernels", "benchmarks", "tests") for path in ROOT.glob(f"{folder}/**/*.py")
    )


def room_of(path: Path) -> str:
    """The room that a file of the library belongs to: its sub-package, or itself."""
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


def imports(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that a file of the package at `root` imports, at any depth."""
    package = (root.name, *path.relative_to(root).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join((*base, *([node.module] if node.module else [])))
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def is_allowed(room: str, other: str) -> bool:
    """Whether `room` may import `other`, both names of rooms."""
    if room in PACKAGE:
        return other in PACKAGE[room]
    below = FLOOR_OF.get(other, len(FLOORS)) < FLOOR_OF[room]
    return other == room or below or other in ARROWS.get(room, ())


@pytest.mark.parametrize("path", sorted(LIBRARY.glob("**/*.py")), ids=lambda path: str(path.relative_to(LIBRARY)))
def test_a_room_imports_only_from_below(path: Path) -> None:
    room = room_of(path)
    assert room in FLOOR_OF or room in PACKAGE, f"{room} has no floor yet: give it one in FLOORS"
    faults = []
    for line, name in imports(path, LIBRARY):
        top, *rest = name.split(".")
        if top == "circuitpress_kernels" and room not in USES_KERNELS:
            faults.append(
                f"line {line}: {room} imports the kernels, which are for {' and '.join(sorted(USES_KERNELS))}"
            )
        if top == "circuitpress" and rest and rest[0] != "__version__" and not is_allowed(room, rest[0]):
            faults.append(f"line {line}: {room} imports {rest[0]}")
    assert not faults, "\n".join(faults)


def test_arrows_stay_on_one_floor_and_form_no_circle() -> None:
    assert all(FLOOR_OF[room] == FLOOR_OF[other] for room, others in ARROWS.items() for other in others)
    TopologicalSorter(ARROWS).prepare()


@pytest.mark.parametrize("path", sorted(KERNELS.glob("**/*.py")), ids=lambda path: path.name)
def test_kernels_are_a_leaf(path: Path) -> None:
    allowed = {"torch", "triton", KERNELS.name, *sys.stdlib_module_names}
    tops = {name.split(".")[0] for _, name in imports(path, KERNELS)}
    assert tops <= allowed, f"{path.name} imports {sorted(tops - allowed)}"


@pytest.mark.parametrize(
    "room", [room for room in TORCH_FREE if list(LIBRARY.glob(room)) + list(LIBRARY.glob(f"{room}.py"))]
)
def test_rooms_that_only_plan_or_print_do_not_load_torch(room: str) -> None:
    code = f"import circuitpress.{room}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0, f"{room} loads torch"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_short_and_says_what_it_does(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MOST_LINES
    assert ast.get_docstring(ast.parse(text)), "no module docstring"


def test_source_roots_and_data_folders_are_not_packages() -> None:
    roots = [
        "compress",
        "kernels",
        "recipes",
        "benchmarks",
        *(path.relative_to(ROOT) for path in (ROOT / "tests").glob("**/")),
    ]
    assert not [root for root in roots if (ROOT / root / "__init__.py").exists()]


def test_the_reader_of_imports_sees_every_form(tmp_path: Path) -> None:
    root = tmp_path / "circuitpress"
    (root / "plan").mkdir(parents=True)
    path = root / "plan" / "solve.py"
    path.write_text(
        "from . import a\nfrom .b import c\nfrom .. import d\ndef f():\n  from ..e.g import h\n  import i.j\n"
    )
    assert [name.removeprefix("circuitpress.") for _, name in imports(path, root)] == [
        "plan.a", "plan.b.c", "d", "e.g.h", "i.j",
    ]  # fmt: skip
    assert not is_allowed("plan", "price")
    assert not is_allowed("units", "stream")
    assert is_allowed("stream", "hooks")
    assert not is_allowed("hooks", "stream")
