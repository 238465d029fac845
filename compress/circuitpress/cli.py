"""The command line: thin, lazy, and the only place that knows exit codes.

click parses; every command imports what it needs when it runs, so `--help` never loads torch (1.1 s) or transformers.
Results go to stdout, as a table or with `--json` as one document; everything else goes to stderr. Failures that a user
can act on are one screen, "error: ... next: ...", without a traceback unless `--debug` is given.

Exit codes: 0 ok, 1 failure, 2 usage or recipe, 3 infeasible budget, 4 quality gate missed, 130 interrupted (resumable).
"""

import sys
from pathlib import Path
from typing import Any

import click

from . import __version__
from .auditing import audit, monitor
from .caching import cache
from .circuitry import circuit
from .command import FOLDER as _FOLDER
from .command import HELP as _HELP
from .command import Failure as _Failure
from .command import command as _command
from .command import device as _device
from .console import Console
from .errors import CircuitpressError
from .evaluating import eval_, lm_eval
from .exporting import export
from .interrupt import interrupts
from .microscope import inspect, sae
from .publishing import push

_set = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one key of the recipe.")
_restart = click.option("--restart", is_flag=True, help="Throw away what an earlier run left in the folder.")


@click.group(context_settings=_HELP)
@click.version_option(__version__, prog_name="circuitpress")
def cli() -> None:
    """Compress language models by what their parts do, priced in nats per token.

    `run` does everything; `score`, `plan`, `apply`, `eval` and `report` are its steps.
    """


@cli.add_command
@_command(
    "circuitpress run recipes/quickstart.yaml",
    "circuitpress run recipe.yaml --set plan.budget=2.5bpw --out runs/small",
    "circuitpress run recipe.yaml --dry-run",
)
@click.argument("recipe", type=_FOLDER)
@_set
@click.option("--out", type=_FOLDER, help="The run folder. Default: runs/NAME-OF-THE-RECIPE.")
@_restart
@click.option("--dry-run", is_flag=True, help="Check the recipe and say what the run would take; write nothing.")
@_device
def run(
    console: Console, recipe: Path, overrides: tuple[str, ...], out: Path | None, restart: bool, dry_run: bool,
    device: str | None,
) -> None:  # fmt: skip
    """Price, plan, compress, measure and explain a model.

    The same command again resumes. Finished stages are kept.
    """
    from .recipe import Recipe
    from .run import check_gates, check_model, run_recipe

    wanted = Recipe.load(recipe, overrides=[*overrides, *_device_override(device)])
    if dry_run:
        console.result(*check_model(wanted.model, wanted))
        return
    text, document = run_recipe(wanted, out or Path("runs") / recipe.stem, console, restart=restart)
    console.result(text, document)
    check_gates(wanted, document)


@cli.add_command
@_command(
    "circuitpress check path/to/checkpoint",
    "circuitpress check user/name@revision --json",
    "circuitpress check path/to/checkpoint --behaviors recipes/behaviors/builtin.yaml",
)
@click.argument("model")
@click.option("--behaviors", type=_FOLDER, help="A file of behaviors: say which of them the model can do.")
@_device
def check(console: Console, model: str, behaviors: Path | None, device: str | None) -> None:
    """Say whether a model is supported and what a run needs.

    Prints its parts, memory and disk. Reads config.json and safetensors headers, no weights; with --behaviors it runs
    their prompts and prints what the model can do instead.
    """
    from .run import check_behaviors, check_model

    if behaviors is not None:
        console.result(*check_behaviors(model, behaviors, console, device=device))
    else:
        console.result(*check_model(model))


@cli.add_command
@_command(
    "circuitpress score path/to/checkpoint --out runs/mine",
    "circuitpress score path/to/checkpoint --out runs/mine --set data.calibration=text.txt",
)
@click.argument("model")
@click.option("--out", type=_FOLDER, required=True, help="The run folder.")
@_set
@_restart
@_device
def score(
    console: Console, model: str, out: Path, overrides: tuple[str, ...], restart: bool, device: str | None
) -> None:
    """Price all parts of a model in every format.

    The same command again resumes. The next step is `plan`.
    """
    import json

    from .recipe import Recipe
    from .run import score_model

    overrides = (f"model={json.dumps(model)}", *overrides, *_device_override(device))
    recipe = Recipe.parse("{}", name="score", folder=Path(), overrides=overrides)
    console.result(*score_model(recipe, out, console, restart=restart))


@cli.add_command
@_command(
    "circuitpress plan runs/mine --budget 3.0bpw",
    "circuitpress plan runs/mine --budget 40% --protect L3.head.2 --pareto",
    "circuitpress plan runs/mine --budget 12ms@batch1 --latencies times.json",
)
@click.argument("folder", metavar="DIR", type=_FOLDER)
@click.option("--budget", help="3.0bpw, 40% (of 16-bit linear weights), 900MB (all files) or 12ms@batch1.")
@click.option("--latencies", type=_FOLDER, help="The times for a budget in time, from `bench kernels --save`.")
@click.option("--target", help="Runtime of the model: native, compressed-tensors, ...")
@click.option("--protect", multiple=True, help="A part that keeps a good format; may be repeated.")
@click.option("--pareto", is_flag=True, help="Show the whole front of budgets and predictions.")
@_device
def plan(
    console: Console, folder: Path, budget: str | None, latencies: Path | None, target: str | None,
    protect: tuple[str, ...], pareto: bool, device: str | None,
) -> None:  # fmt: skip
    """Spend a budget on a scored model.

    Nothing is scored again, so it takes seconds. The next step is `apply`.
    """
    from .run import replan

    del device  # planning runs on the CPU
    console.result(
        *replan(
            folder, console, budget=budget, target=target, protect=protect, front=pareto, latencies=latencies
        )
    )  # fmt: skip


@cli.add_command
@_command("circuitpress apply runs/mine")
@click.argument("folder", metavar="DIR", type=_FOLDER)
@_device
def apply(console: Console, folder: Path, device: str | None) -> None:
    """Write the model of a plan.

    The same command again resumes. The next step is `eval`.
    """
    from .run import apply_plan

    console.result(*apply_plan(folder, console, device=device))


@cli.add_command
@_command("circuitpress report runs/mine")
@click.argument("folder", metavar="DIR", type=_FOLDER)
@_device
def report(console: Console, folder: Path, device: str | None) -> None:  # noqa: ARG001 (nothing is computed)
    """Write a run folder's report.html.

    One self-contained page: what was asked, what came out, prices, bits, predicted and measured KL.
    """
    from .run import make_report

    console.result(*make_report(folder, console))


@cli.add_command
@_command("circuitpress diff runs/a runs/b", "circuitpress diff old/plan.json new/plan.json")
@click.argument("first", metavar="PLAN_A", type=_FOLDER)
@click.argument("second", metavar="PLAN_B", type=_FOLDER)
@_device
def diff(console: Console, first: Path, second: Path, device: str | None) -> None:  # noqa: ARG001 (nothing is computed)
    """Show what differs between two plans.

    Either is a plan.json or a run folder.
    """
    from .run import compare_plans

    console.result(*compare_plans(first, second))


@cli.group(context_settings=_HELP)
def bench() -> None:
    """Measure side by side with others.

    The same checkpoint, the same tokens, one judge.
    """


@bench.add_command
@_command(
    "circuitpress bench quality path/to/checkpoint --text train.txt --test test.txt",
    "circuitpress bench quality MODEL --peers hqq,gptqmodel --bits 3,4 --budget 3.2 --out runs/compared",
)
@click.argument("model")
@click.option("--text", type=_FOLDER, help="Text that everybody calibrates on. Default: the one in circuitpress.")
@click.option("--test", "tests", type=_FOLDER, multiple=True, help="Text to measure on; may be repeated.")
@click.option("--peers", help="Comma-separated; `none` for none. Default: all that can run.")
@click.option("--bits", default="2,3,4", show_default=True, help="Nominal widths of the peers, comma-separated.")
@click.option(
    "--groups", default="64,32", show_default=True, help="Group sizes of the peers, the first one everywhere."
)
@click.option("--budget", "budgets", type=float, multiple=True, help="Our bits per weight. Default: the best peers'.")
@click.option("--recipe", type=_FOLDER, help="How our side compresses; its model and data are replaced.")
@click.option("--samples", type=click.IntRange(8), default=128, show_default=True, help="Windows to calibrate on.")
@click.option("--windows", type=click.IntRange(1), default=64, show_default=True, help="Windows of each test text.")
@click.option("--length", type=click.IntRange(2), default=256, show_default=True, help="Tokens in a window.")
@click.option("--cache", type=_FOLDER, help="Where the peers' environments lie. Default: $CIRCUITPRESS_PEERS.")
@click.option("--out", type=_FOLDER, default=Path("runs/quality"), show_default=True, help="Results and finished work.")
@_device
def quality(console: Console, device: str | None, **options: Any) -> None:  # noqa: ARG001 (all run on the CPU)
    """Compare with other compressors at equal bytes.

    Installs each in an environment of its own, runs it, and judges everybody's weights with one evaluator. The same
    command again judges what is done.
    """
    from .bench import compare_from_options

    console.result(*compare_from_options(console, **options))


@bench.add_command
@_command(
    "circuitpress bench kernels runs/mine --save times.json",
    "circuitpress bench kernels MODEL --formats int3g64,int4g64,int8g64,bfloat16 --batch 1,8",
    "circuitpress bench kernels MODEL --tune",
)
@click.argument("model")
@click.option("--formats", help="Comma-separated. Default: those that a run folder prices.")
@click.option("--batch", "batches", default="1", show_default=True, help="Tokens of a step, comma-separated.")
@click.option("--save", type=_FOLDER, help="Where the table goes, for budgets in time.")
@click.option("--tune", is_flag=True, help="First choose how kernels are launched on this GPU, and keep that.")
@_device
def kernels(console: Console, model: str, **options: Any) -> None:
    """Time every format on this machine.

    For the shapes of a model, as a loaded model runs them. Plans with a budget in time spend it by this table.
    """
    from .bench.timing import time_formats

    console.result(*time_formats(model, console, **options))


cli.add_command(eval_)
cli.add_command(lm_eval)
cli.add_command(circuit)
cli.add_command(sae)
cli.add_command(inspect)
cli.add_command(audit)
cli.add_command(monitor)
cli.add_command(cache)
cli.add_command(export)
cli.add_command(push)


def _device_override(device: str | None) -> list[str]:
    return [f"run.device={device}"] if device else []


def main(args: list[str] | None = None) -> None:
    """The entry point: runs a command and leaves the process with its exit code."""
    sys.exit(invoke(args))


def invoke(args: list[str] | None = None) -> int:
    """Runs a command and returns its exit code; what went wrong is on stderr."""
    with interrupts() as interrupted:
        try:
            code = cli.main(args, prog_name="circuitpress", standalone_mode=False)
        except _Failure as failure:
            error = failure.error
            if interrupted():
                error = KeyboardInterrupt().with_traceback(error.__traceback__)
            return _show(error, failure.console)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "circuitpress"
            Console().fail(error.format_message(), f"{command} --help")
            return 2
        except click.ClickException as error:
            Console().fail(error.format_message())
            return error.exit_code
        except (click.Abort, KeyboardInterrupt):
            return _show(KeyboardInterrupt(), Console())
    return code if isinstance(code, int) else 0


def _show(error: BaseException, console: Console) -> int:
    """Prints a failure on one screen and returns its exit code."""
    if console.debug:
        import traceback

        console.fail("".join(traceback.format_exception(error)).rstrip())
    if isinstance(error, KeyboardInterrupt):
        console.fail("interrupted", "the same command again goes on where it stopped")
        return 130
    if isinstance(error, CircuitpressError):
        console.fail(error.message, error.hint)
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        return 1
    console.fail(
        f"{type(error).__name__}: {error}", None if console.debug else "run again with --debug for a traceback"
    )
    return 1
