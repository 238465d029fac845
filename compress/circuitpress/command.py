"""How a command of the command line is made: the same options, examples and way of failing for all of them."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from .console import Console

HELP = {"help_option_names": ["-h", "--help"]}
"""The context settings of groups and commands."""
FOLDER = click.Path(path_type=Path)
"""A path of the file system; whether it is there is for the command to say."""


class Failure(click.ClickException):
    """Carries any failure of a command, with the console that shows it, through click to `main`."""

    def __init__(self, error: BaseException, console: Console) -> None:
        super().__init__(str(error))
        self.error = error
        self.console = console


def command(*examples: str) -> Callable[[Callable[..., None]], click.Command]:
    """Makes a command of a function whose first argument is the Console; adds the common options and the examples."""

    def wrap(function: Callable[..., None]) -> click.Command:
        @wraps(function)
        def call(*, json: bool, quiet: bool, debug: bool, **values: Any) -> None:
            console = Console(quiet=quiet, json=json, debug=debug)
            try:
                with console.listening():
                    function(console, **values)
            except (click.ClickException, click.Abort, click.exceptions.Exit):
                raise
            except (Exception, KeyboardInterrupt) as error:
                raise Failure(error, console) from error

        epilog = "\b\nExamples:\n" + "\n".join(f"  {example}" for example in examples)
        name = function.__name__.removesuffix("_")
        result = click.command(name, epilog=epilog, context_settings=HELP)(call)
        result.params += [
            click.Option(["--json"], is_flag=True, help="Print one JSON document on stdout instead of a table."),
            click.Option(["--quiet"], is_flag=True, help="No progress on stderr; errors are still shown."),
            click.Option(["--debug"], is_flag=True, help="Show the log on stderr, and tracebacks."),
        ]
        return result

    return wrap


device = click.option("--device", help="auto, cpu, cuda, cuda:1, mps. Default: what the recipe says, else auto.")
