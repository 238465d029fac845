"""The commands that measure a model: `eval`, and lm-evaluation-harness's own command line. Thin and lazy."""

from pathlib import Path
from typing import Any

import click

from .command import FOLDER, HELP, command, device
from .console import Console
from .errors import QualityGateMissed, RecipeError


@command(
    "circuitpress eval runs/mine/model",
    "circuitpress eval MODEL_DIR --reference path/to/original --text test.txt --windows 32 --length 512",
    "circuitpress eval runs/mine/model --baseline nf4,int8,gptq",
    "circuitpress eval runs/mine/model --tasks arc_easy,hellaswag --min-recovery 0.98",
    "circuitpress eval runs/mine/model --tasks local_blimp --include recipes/tasks --task-data path/to/data",
)
@click.argument("model", metavar="MODEL_DIR", type=FOLDER)
@click.option("--reference", help="The original model. Default: that of the run folder around MODEL_DIR.")
@click.option("--text", type=FOLDER, help="Text to measure on. Default: the run's test text.")
@click.option("--windows", type=click.IntRange(1), help="Windows of text. Default: 64, or the run's.")
@click.option("--length", type=click.IntRange(2), help="Tokens in a window. Default: 512, or the run's.")
@click.option(
    "--baseline",
    help="Also nf4, int8 (bitsandbytes) and gptq (GPTQModel, the setting nearest in bytes) of the original, "
    "comma-separated. gptq is installed into an environment of its own: gigabytes, once.",
)
@click.option("--tasks", help="Tasks of lm-evaluation-harness, comma-separated, for both models.")
@click.option("--include", type=FOLDER, help="A folder with task YAMLs of your own.")
@click.option("--task-data", type=FOLDER, help="Where their relative data files start. Default: here.")
@click.option("--shots", type=click.IntRange(0), help="Examples in a prompt. Default: as the task says.")
@click.option("--limit", type=click.IntRange(1), help="Documents of each task. Default: all.")
@click.option("--chat-template", is_flag=True, help="Put the tokenizer's chat template around prompts.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Of the tasks' requests.")
@click.option("--min-recovery", type=click.FloatRange(0), help="Exit with 4 if less of the task scores is left.")
@device
def eval_(
    console: Console, model: Path, reference: str | None, text: Path | None, windows: int | None, length: int | None,
    baseline: str | None, tasks: str | None, include: Path | None, task_data: Path | None, shots: int | None,
    limit: int | None, chat_template: bool, batch_size: int, min_recovery: float | None, device: str | None,
) -> None:  # fmt: skip
    """Measure a model against its original.

    Prints KL in nats per token, top-1 agreement and perplexity; with --tasks, the scores of both models on the same
    documents and the standard error of their difference. In a run folder the next step is `report`.
    """
    from .run import measure_model, measure_tasks

    if tasks is None and (min_recovery is not None or include is not None):
        raise RecipeError(["--min-recovery and --include are about tasks"], hint="add --tasks NAME,NAME")
    settings = None
    if tasks is not None:
        from .evaluate.tasks import TaskSettings, check_tasks

        settings = TaskSettings(_names(tasks), include, task_data, shots, limit, chat_template, batch_size)
        check_tasks(settings)  # before anything is measured
    beside = None
    if baseline is not None:
        from .bench.gptq import gptq
        from .evaluate.baselines import choose

        beside = choose(_names(baseline), {"gptq": gptq})  # before anything is measured
    shown, document = measure_model(
        model, console, reference=reference, text=text, windows=windows, length=length, baselines=beside,
        device=device,
    )  # fmt: skip
    if settings is not None:
        table, compared = measure_tasks(model, console, settings=settings, reference=reference, device=device)
        shown, document = f"{shown}\n{table}", document | {"tasks": compared["rows"]} | _about(compared)
    console.result(shown, document)
    recovery: float | None = document.get("recovery")
    if min_recovery is not None and (recovery is None or recovery < min_recovery):
        left = "no score to compare" if recovery is None else f"{recovery:.4f} of the task scores is left"
        raise QualityGateMissed(f"{left}, --min-recovery is {min_recovery:g}", hint="give the plan a larger budget")


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name for name in (part.strip() for part in (text or "").split(",")) if name)


def _about(compared: dict[str, Any]) -> dict[str, Any]:
    return {"recovery": compared["recovery"], "task_settings": compared["settings"], "about": compared["provenance"]}


@click.command(
    "lm-eval",
    context_settings=HELP | {"ignore_unknown_options": True, "help_option_names": []},
    epilog="\b\nExamples:\n  circuitpress lm-eval --model circuitpress --model_args pretrained=DIR --tasks arc_easy",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval(arguments: tuple[str, ...]) -> None:
    """Run lm-evaluation-harness with --model circuitpress.

    All arguments are the harness's own; `circuitpress lm-eval --help` is its help.
    """
    from .evaluate.harness import command_line

    command_line(arguments)
