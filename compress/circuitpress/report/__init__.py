"""One self-contained page about a run: what was asked, what came out, and how far the predictions held.

`write_report` reads only files of the run folder and loads no model; the page needs no script, no network and no fonts.
"""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ..files import write_bytes_atomic
from .read import read_run

__all__ = ["write_audit", "write_report"]


def write_audit(document: Mapping[str, Any], path: Path) -> Path:
    """Writes the page of an audit (the content of audit.json) to `path` and returns it."""
    # matplotlib is imported when a page is drawn, and not by `circuitpress --help`, which would pay 0.3 s for it.
    from .audited import build_audit

    return _write(path, "audit.html.j2", {"audit": build_audit(document)})


def write_report(folder: Path) -> Path:
    """Writes report.html into the run folder `folder` and returns its path.

    Sections whose files are missing say which command makes them. The same files give the same bytes. Raises
    CircuitpressError if there is no plan yet.
    """
    from .page import build_context

    return _write(folder / "report.html", "template.html.j2", build_context(read_run(folder)))


def _write(path: Path, template: str, context: Mapping[str, Any]) -> Path:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    files = resources.files(__name__)
    loader = FunctionLoader(lambda name: files.joinpath(name).read_text(encoding="utf-8"))
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = files.joinpath("style.css").read_text(encoding="utf-8")
    page = environment.get_template(template).render(context, style=style)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(path, page.encode())
    return path
