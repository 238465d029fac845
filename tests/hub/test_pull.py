"""Checkpoints by Hub id, from a Hub on the loopback interface: what comes, and what is said when nothing comes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from loopback import Repository, loopback_hub

RESOLVE = """
import sys
from circuitpress.checkpoint import resolve_checkpoint
from circuitpress.errors import CheckpointError
for model in sys.argv[1:]:
    try:
        print(resolve_checkpoint(model))
    except CheckpointError as error:
        print(f"{error.message} | {error.hint}")
"""


def _resolve(url: str, home: Path, *models: str, **more: str) -> list[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment = kept | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"} | more
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, *models],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


@pytest.fixture(scope="module")
def answers(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("home")
    files = {file.name: file.read_bytes() for file in tiny_llama.iterdir()}
    files |= {"USE_POLICY.md": b"be kind", "pytorch_model.bin": b"never", "modeling.py": b"never"}
    with loopback_hub() as hub:
        hub.repositories["org/open"] = opened = Repository(False, {"main": {}, "v2": files})
        opened.history[opened.sha] = files
        hub.repositories["org/gated"] = Repository(False, {"main": files}, gated=True)
        models = ("org/open@v2", "org/open@v9", "org/gated", "org/absent")
        found = dict(zip(models, _resolve(hub.url, home, *models), strict=True))
        found["again"] = _resolve(hub.url, home, "org/open@v2", HF_HUB_OFFLINE="1")[0]
    found["offline"] = _resolve(hub.url, home, "org/other", HF_HUB_OFFLINE="1")[0]
    found["no server"] = _resolve(hub.url, home, "org/other")[0]
    return found


def test_a_pinned_revision_comes_whole_and_without_code(answers: dict[str, str], tiny_llama: Path) -> None:
    folder = Path(answers["org/open@v2"])
    names = {file.name for file in folder.iterdir()}
    assert names == {file.name for file in tiny_llama.iterdir()} | {"USE_POLICY.md"}
    assert (folder / "config.json").read_bytes() == (tiny_llama / "config.json").read_bytes()
    assert answers["again"] == answers["org/open@v2"], "without a network, from the cache"


@pytest.mark.parametrize(
    ("case", "cause", "following"),
    [
        ("org/open@v9", "no revision 'v9'", "org/open"),
        ("org/gated", "asks for a licence to be accepted", "hf auth login"),
        ("org/absent", "no such repository", "check the spelling"),
        ("offline", "the Hub cannot be reached", "HF_HUB_OFFLINE"),
        ("no server", "the Hub cannot be reached", "pass the folder"),
    ],
)
def test_what_does_not_come_is_told_with_the_next_command(
    answers: dict[str, str], case: str, cause: str, following: str
) -> None:
    message, _, hint = answers[case].partition(" | ")
    assert cause in message and following in hint
