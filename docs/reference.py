"""Writes docs/reference.md from the code: every command with its help, every key of a recipe, every exit code.

python docs/reference.py           # rewrites the page
python docs/reference.py --check   # exits 1 if it is out of date
"""

from pathlib import Path
from typing import Any

import click

from circuitpress.cli import cli
from circuitpress.recipe import Recipe

PAGE = Path(__file__).with_name("reference.md")
EXITS = (
    (0, "done"),
    (1, "failed: the message says why, and what to do next"),
    (2, "the command line or the recipe is wrong"),
    (3, "no plan fits the budget; the message says the smallest that does"),
    (4, "done, and a gate is missed: KL, agreement, a behavior, the recovery of tasks"),
    (130, "interrupted; the same command goes on"),
)


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; exit 1 if the page is out of date.")
def main(check: bool) -> None:
    """Brings docs/reference.md up to date."""
    page = render()
    if check and page != PAGE.read_text():
        raise SystemExit("docs/reference.md is out of date: run python docs/reference.py")
    if not check:
        PAGE.write_text(page)


def render() -> str:
    """The whole page."""
    lines = ["# Reference", "", "Written by `python docs/reference.py` from the code.", "", "## Commands", ""]
    lines += ["Every command takes `--json`, `--quiet`, `--debug` and `--device`.", ""]
    for name, command in sorted(_leaves("", cli)):
        lines += _command(name, command)
    lines += ["## Exit codes", "", "| code | meaning |", "| --- | --- |"]
    lines += [f"| {code} | {meaning} |" for code, meaning in EXITS]
    lines += ["", "## Recipe", "", "`schema` and `model` stand alone, all other keys in a section.", ""]
    lines += ["| key | default | meaning |", "| --- | --- | --- |", *_keys()]
    return "\n".join(lines) + "\n"


def _leaves(prefix: str, group: click.Group) -> list[tuple[str, click.Command]]:
    found: list[tuple[str, click.Command]] = []
    for name, command in group.commands.items():
        whole = f"{prefix} {name}".strip()
        found += _leaves(whole, command) if isinstance(command, click.Group) else [(whole, command)]
    return found


def _command(name: str, command: click.Command) -> list[str]:
    arguments = " ".join(p.make_metavar(_context(command)) for p in command.params if isinstance(p, click.Argument))
    lines = [f"### circuitpress {name}", "", f"    circuitpress {name} {arguments}".rstrip(), ""]
    lines += [" ".join((command.help or "").split()), ""]
    rows = [_option(p) for p in command.params if isinstance(p, click.Option) and p.name not in COMMON]
    if rows:
        lines += ["| option | meaning |", "| --- | --- |", *rows, ""]
    examples = [line.strip() for line in (command.epilog or "").splitlines() if "circuitpress" in line]
    return [*lines, *(f"    {example}" for example in examples), ""]


COMMON = ("json", "quiet", "debug", "device")


def _context(command: click.Command) -> click.Context:
    return click.Context(command)


def _option(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in option.opts)
    default = option.default if option.show_default and option.default is not None else None
    note = f" Default: {default}." if default is not None and not option.is_flag else ""
    many = " May be repeated." if option.multiple and "repeated" not in (option.help or "") else ""
    return f"| {names} | {(option.help or '').rstrip('.')}.{note}{many} |"


def _keys() -> list[str]:
    schema = Recipe.model_json_schema(by_alias=True)
    sections: dict[str, Any] = schema["$defs"]
    rows = []
    for name, entry in schema["properties"].items():
        section = sections.get(str(entry.get("$ref", "")).rpartition("/")[2])
        if section is None:
            rows.append(_key(name, entry))
            continue
        rows += [_key(f"{name}.{key}", field) for key, field in section["properties"].items()]
    behavior = sections["KeptBehavior"]
    rows += [_key(f"behaviors[].{key}", field) for key, field in behavior["properties"].items()]
    return rows


def _key(name: str, field: dict[str, Any]) -> str:
    default = "" if "default" not in field else f"`{field['default']}`"
    default = {"`None`": "none", "`[]`": "none", "`{}`": "none"}.get(default, default)
    return f"| `{name}` | {default} | {' '.join(str(field.get('description', '')).split())} |"


if __name__ == "__main__":
    main()
