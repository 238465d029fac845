"""The command line: fast help, exit codes, one-screen errors, results on stdout only, a run killed and resumed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from circuitpress.cli import cli, invoke
from circuitpress.errors import CircuitpressError, InfeasibleBudget, QualityGateMissed

LEAVES = {name: command for name, command in cli.commands.items() if not isinstance(command, click.Group)}
LEAVES |= {
    f"{name} {leaf}": command
    for name, group in cli.commands.items()
    if isinstance(group, click.Group)
    for leaf, command in group.commands.items()
}
COMMANDS = sorted(LEAVES)

RECIPE = """
model: {model}
data: {{calibration: {text}, samples: 6, length: 24}}
evaluate: {{windows: 3}}
quantize: {{group_size: 16}}
plan: {{budget: 5bpw, formats: [int2, int4, int8, dense], probes: [int3, int8]}}
run: {{device: cpu}}
"""


@pytest.fixture
def recipe(tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE.format(model=tiny_llama, text=text_file))
    return path


def test_help_is_fast_and_loads_no_torch() -> None:
    """Measured at 0.07 s; half a second leaves room for a busy machine, torch alone takes 1.1 s."""
    code = "import sys; sys.argv = ['circuitpress', '--help']; from circuitpress.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\nheavy = {'torch', 'transformers', 'numpy', 'pydantic', 'rich'}\n"
    code += "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert time.monotonic() - started < 1
    assert done.returncode == 0, done.stderr
    looks = ["circuit find", "circuit verify", "inspect"]
    looks += ["sae explain", "sae features", "sae labels", "sae score", "sae steer", "sae train"]
    compares = ["audit", "bench kernels", "bench quality", "diff", "eval", "lm-eval", "monitor check", "monitor fit"]
    steps = ["apply", "cache", "check", "export", "plan", "push", "report", "run", "score"]
    assert sorted(looks + compares + steps) == COMMANDS
    assert all(f"\n  {name} " in done.stdout for name in cli.commands)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "lm-eval"])
def test_every_help_has_examples_and_the_common_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"Examples:\n +circuitpress {command} ", text)
    for option in ("--json", "--device", "--quiet", "--debug"):
        assert option in text
    assert "..." not in LEAVES[command].get_short_help_str(60)


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_parse(command: str) -> None:
    epilog, words = LEAVES[command].epilog or "", 1 + len(command.split())
    examples = [line.split()[words:] for line in epilog.splitlines() if line.strip().startswith("circuitpress")]
    assert examples
    for arguments in examples:
        assert LEAVES[command].make_context(command, arguments)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["--version"]) == 0
    assert re.fullmatch(r"circuitpress, version \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["plann", "x"], "plan"),
        (["plan", "x", "--budgte", "3bpw"], "--budget"),
        (["eval", "x", "--windows", "0"], "--windows"),
        (["run"], "Missing argument 'RECIPE'"),
        (["score", "x"], "Missing option '--out'"),
    ],
)
def test_usage_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert message in err
    assert re.search(r"\nnext:  circuitpress.* --help\n$", err)


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (CircuitpressError("broken", hint="mend it"), 1, ["error: broken", "next:  mend it"]),
        (InfeasibleBudget("too small", smallest_bits=2.5, smallest_bytes=9), 3, ["error: too small"]),
        (QualityGateMissed("KL is 2"), 4, ["error: KL is 2"]),
        (KeyboardInterrupt(), 130, ["error: interrupted", "next:  the same command again goes on where it stopped"]),
        (ZeroDivisionError("oh"), 1, ["error: ZeroDivisionError: oh", "next:  run again with --debug for a traceback"]),
    ],
)
def test_failures_are_one_screen_with_an_exit_code(
    error: BaseException, code: int, lines: list[str],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("circuitpress.run.check_model", fail)
    assert invoke(["check", "x"]) == code
    out, err = capsys.readouterr()
    assert (out, err.splitlines()) == ("", lines)
    assert invoke(["check", "x", "--debug"]) == code
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_check_reads_no_weights(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every byte after the header is zero: a command that computed with weights would fail or differ."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    data = (folder / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    (folder / "model.safetensors").write_bytes(data[:header] + bytes(len(data) - header))
    assert invoke(["check", str(folder), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["units"] == {"head": 18, "kv_group": 9, "neuron": 156}
    assert document["linear_numel"] == 3 * (48 * 48 * 2 + 48 * 24 * 2 + 48 * 52 * 3)
    assert document["matrices"] == 21
    assert document["peak_memory"] == sum(document["memory"].values())
    assert invoke(["check", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "llama, float32, supported" in text
    assert max(len(line) for line in text.splitlines() if str(folder) not in line) <= 80


def test_run_prints_a_table_and_goes_quiet(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["run", str(recipe)]) == 0
    out, err = capsys.readouterr()
    for part in ("small.yaml", "bits per weight", "predicted", "corrected", "measured", "runs/small/report.html"):
        assert part in out or part == "small.yaml"
    assert re.search(r"^apply +3/3 ", err, re.MULTILINE)
    assert invoke(["run", str(recipe), "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert not err
    assert document["out"] == "runs/small"
    assert document["bits_per_weight"] <= 5
    # A gate that is missed: the result is printed all the same.
    assert invoke(["run", str(recipe), "--set", "evaluate.max_kl=1e-9", "--json"]) == 4
    out, err = capsys.readouterr()
    assert json.loads(out)["kl"] == document["kl"]
    assert "evaluate.max_kl is 1e-09" in err
    assert invoke(["diff", "runs/small", "runs/small/plan.json"]) == 0
    assert "0 of 21 groups differ" in capsys.readouterr().out


def test_the_steps_one_by_one_end_where_run_does(
    recipe: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["run", str(recipe), "--quiet", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    text = re.search(r"calibration: ([^,]+),", recipe.read_text())
    assert text
    settings = [
        f"data.calibration={text[1]}", "data.samples=6", "data.length=24", "evaluate.windows=3",
        "quantize.group_size=16", "plan.formats=[int2, int4, int8, dense]", "plan.probes=[int3, int8]",
    ]  # fmt: skip
    flags = [part for setting in settings for part in ("--set", setting)]
    assert invoke(["score", str(tiny_llama), "--out", "steps", "--quiet", "--device", "cpu", *flags]) == 0
    assert "next: circuitpress plan steps --budget 3.0bpw" in capsys.readouterr().out
    assert invoke(["apply", "steps"]) == 1
    assert "next:  circuitpress plan steps" in capsys.readouterr().err
    assert invoke(["plan", "steps", "--budget", "1bpw"]) == 3
    assert "bits per weight" in capsys.readouterr().err
    assert invoke(["plan", "steps", "--budget", "5bpw", "--json", "--pareto"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {"budget", "target", "bits_per_weight", "linear_bytes", "predicted_kl", "decisions", "pareto"} <= set(plan)
    assert invoke(["apply", "steps", "--quiet"]) == 0
    assert invoke(["eval", "steps/model", "--quiet", "--json"]) == 0
    out = capsys.readouterr().out
    fidelity = json.loads(out[out.index("{") :])
    assert invoke(["report", "steps"]) == 0
    assert (Path("steps") / "report.html").stat().st_size > 1000
    for key in ("kl", "perplexity", "bits_per_weight", "bytes"):
        assert fidelity[key] == pytest.approx(whole[key], rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "nothing.yaml"], 2, "cannot read the recipe nothing.yaml"),
        (["run", "small.yaml", "--set", "plan.bugdet=3bpw"], 2, "plan.bugdet: unknown key; did you mean plan.budget?"),
        (["run", "small.yaml", "--set", "data.test=nothing.txt"], 2, "data.test: no such file"),
        (["run", "small.yaml", "--set", "plan.budget=1bpw"], 3, "the smallest plan takes"),
        (["run", "small.yaml", "--set", "data.length=64", "--set", "data.test=short.txt"], 1, "one window needs 64"),
        (["run", "small.yaml", "--out", "."], 1, "is not a run of circuitpress: it holds"),
        (["check", "nothing"], 1, "nothing: no such folder"),
        (["check", "."], 1, "has no config.json"),
        (["score", "./nothing", "--out", "x"], 2, "model: no such folder"),
        (["plan", "nothing", "--budget", "3bpw"], 1, "nothing: no such run folder"),
        (["diff", "nothing", "nothing"], 2, "cannot read the plan nothing"),
        (["diff", "small.yaml", "small.yaml"], 2, "is not a plan of circuitpress"),
        (["eval", "nothing", "--reference", "nothing"], 1, "nothing: no such folder"),
        (["report", "nothing"], 1, "nothing: no such run folder"),
    ],
)
def test_bad_input_is_one_screen(
    recipe: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipe.parent / "short.txt").write_text("the boat")
    assert invoke([*arguments, "--quiet"] if arguments[0] == "run" else arguments) == code
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert "\nnext:  " in err
    assert message in err
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 12


def test_every_command_line_hint_of_the_library_parses() -> None:
    """Hints name commands and options; a renamed option must not leave a wrong one behind."""
    hints = re.compile(rf"circuitpress ({'|'.join(cli.commands)})\b[^\"\n;]*")
    options = {option for command in LEAVES.values() for p in command.params for option in (*p.opts, *p.secondary_opts)}
    files = sorted((Path(__file__).parents[1] / "compress").glob("**/*.py"))
    assert len(files) > 20
    for path in files:
        for hint in hints.finditer(path.read_text()):
            if hint[1] == "lm-eval":  # the harness's own options
                continue
            for word in re.findall(r"--[a-z]+(?:-[a-z]+)*", hint[0]):
                assert word in options | {"--help"}, f"{path.name}: {hint[0]}"


def test_interrupted_and_killed_runs_resume(recipe: Path) -> None:
    """A real process gets SIGINT, then SIGKILL, in the middle of the work; the third one finishes."""
    # Started in the background by a shell, this process ignores SIGINT, and its children inherit that.
    start = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    start += "; from circuitpress.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", start, "run", str(recipe), "--set", "data.samples=40"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stderr
        seen = [process.stderr.readline() for _ in range(2)]
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, seen
        assert not out
        if number == signal.SIGINT:
            assert "error: interrupted\nnext:  the same command again" in err
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "bits per weight" in done.stdout


def test_click_reports_the_interrupt_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def abort(*_: object, **__: object) -> None:
        raise click.Abort

    monkeypatch.setattr(cli, "main", abort)
    assert invoke(["check", "x"]) == 130


def test_a_dry_run_checks_and_writes_nothing(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(recipe.parent.rglob("*"))
    assert invoke(["run", str(recipe), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["linear_numel"] > 0
    assert sorted(recipe.parent.rglob("*")) == before
    assert invoke(["run", str(recipe), "--dry-run", "--set", "plan.budget=never"]) == 2
