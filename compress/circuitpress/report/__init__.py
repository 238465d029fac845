"""One self-contained page about a run: what was asked, what came out, and how far the predictions held.

`write_report` reads only files of the run folder and loads no model; the page needs no script, no network and no fonts.
"""

from importlib import resources
from pathlib import Path

from ..files import write_bytes_atomic
from .read import read_run

__all__ = ["write_report"]


def write_report(folder: Path) -> Path:
    """Writes report.html into the run folder `folder` and returns its path.

    Sections whose files are missing say which command makes them. The same files give the same bytes. Raises
    CircuitpressError if there is no plan yet.
    """
    # Imported here: matplotlib takes 0.3 s that `circuitpress --help` would pay for.
    from jinja2 import Environment, StrictUndefined

    from .page import build_context

    files = resources.files(__name__)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files.joinpath("template.html.j2").read_text(encoding="utf-8"))
    style = files.joinpath("style.css").read_text(encoding="utf-8")
    page = template.render(build_context(read_run(folder)), style=style)
    path = folder / "report.html"
    write_bytes_atomic(path, page.encode())
    return path
