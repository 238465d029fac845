"""Publishing to a Hub on the loopback interface with the real client, and loading from there."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from circuitpress.errors import CircuitpressError
from circuitpress.hub import prepare
from circuitpress.hub.card import scrubbed

sys.path.insert(0, str(Path(__file__).parent))
from loopback import TOKEN, Hub, Repository, loopback_hub

LOAD = """
import sys, torch, circuitpress
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], revision=sys.argv[2])
print(model(torch.arange(3, 14)[None]).logits.double().sum().item())
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with loopback_hub() as found:
        yield found


def _environment(hub: Hub, home: Path, token: str = TOKEN) -> dict[str, str]:
    names = ("HF_HUB_OFFLINE", "HF_TOKEN", "TRANSFORMERS_OFFLINE")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    hub_settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
    return kept | hub_settings | {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}


def _push(hub: Hub, home: Path, *arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "circuitpress", "push", *arguments], env=_environment(hub, home, token),
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_what_was_pushed_is_what_loads(hub: Hub, published: Path, tmp_path: Path) -> None:
    model = published / "model"
    done = _push(hub, tmp_path, str(model), "me/tiny", "--base", "org/base", "--private", "--revision", "small")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["me/tiny"]
    assert repository.private and repository.commits == 1 and not repository.branches["main"]
    files = repository.branches["small"]
    for file in model.iterdir():
        assert files[file.name] == file.read_bytes()
    assert files["LICENSE"].startswith(b"Apache License")
    assert {"README.md", "recipe.yaml", "plan.json", "evaluate/fidelity.json"} <= set(files)
    card = files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "org/base" and front["base_model_relation"] == "quantized"
    assert front["license"] == "apache-2.0"
    kl = json.loads((published / "evaluate" / "fidelity.json").read_text())["kl"]
    assert f"{kl:.4g}" in card and "Protected by name: " in card
    assert not any(str(published.parent).encode() in content for content in files.values())

    def answer(where: str, revision: str) -> float:
        output = subprocess.run(
            [sys.executable, "-c", LOAD, where, revision], env=_environment(hub, tmp_path), capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert output.returncode == 0, output.stderr
        return float(output.stdout)

    assert answer("me/tiny", "small") == answer(str(model), "main")


def test_an_interrupted_upload_goes_on_where_it_stopped(hub: Hub, published: Path, tmp_path: Path) -> None:
    model = published / "model"
    hub.silent_after = 2
    process = subprocess.Popen(
        [sys.executable, "-m", "circuitpress", "push", str(model), "me/tiny", "--base", "org/base"],
        env=_environment(hub, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 100
    while len(hub.puts()) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert len(hub.objects) == 2 and len(hub.puts()) == 3
    assert hub.repositories["me/tiny"].commits == 0, "half a model must not be seen"
    first, hub.silent_after = set(hub.objects), None
    hub.log.clear()
    done = _push(hub, tmp_path, str(model), "me/tiny", "--base", "org/base")
    assert done.returncode == 0, done.stderr
    weights = {hashlib.sha256(file.read_bytes()).hexdigest() for file in model.glob("*.safetensors")}
    assert set(hub.puts()) == weights - first, "what had arrived was not sent again, the rest was"
    assert hub.repositories["me/tiny"].commits == 1


def test_a_dry_run_sends_nothing(hub: Hub, published: Path, tmp_path: Path) -> None:
    done = _push(hub, tmp_path, str(published), "me/tiny", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["dry_run"] and "model.safetensors.index.json" in document["files"]
    assert document["card"].startswith("---")
    assert document["warnings"] == ["the card names no base model: add --base user/name"]
    assert hub.log == []


def test_a_wrong_token_is_told_with_the_next_command(hub: Hub, published: Path, tmp_path: Path) -> None:
    done = _push(hub, tmp_path, str(published / "model"), "me/tiny", token="hf_wrong")
    assert done.returncode == 1
    assert "the token is missing or wrong" in done.stderr and "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr and not hub.repositories


def test_all_that_forbids_publishing_is_told_at_once(published: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(published / "model", model)
    next(model.glob("*.safetensors")).unlink()
    (model / "weights.bin").write_bytes(b"x")
    with pytest.raises(CircuitpressError) as caught:
        prepare(model, "no name", base="also/not/one")
    for part in ("'no name'", "'also/not/one'", "weights.bin may run code", "the model is not whole"):
        assert part in caught.value.message
    with pytest.raises(CircuitpressError, match="holds no model"):
        prepare(tmp_path / "nowhere", "me/tiny")


def test_hidden_files_and_an_old_card_stay_at_home(published: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(published / "model", model)
    (model / ".secret").write_text("x")
    (model / ".cache").mkdir()
    (model / ".cache" / "x.json").write_text("{}")
    (model / "README.md").write_text("old")
    upload = prepare(model, "me/tiny", base="org/base", licence="mit")
    assert not any(name.startswith(".") for name in upload.files) and "old" not in upload.card
    assert "Nothing was measured" in upload.card, "outside a run folder there is no evidence"


def test_private_is_never_sent_to_a_public_repository(hub: Hub, published: Path, tmp_path: Path) -> None:
    hub.repositories["me/tiny"] = Repository(private=False)
    done = _push(hub, tmp_path, str(published / "model"), "me/tiny", "--base", "org/base", "--private")
    assert done.returncode == 1 and "is there already and public" in done.stderr
    assert not hub.puts() and hub.repositories["me/tiny"].commits == 0


def test_no_file_tells_where_it_was_made(published: Path, tmp_path: Path) -> None:
    """Every path of a recipe, those of later keys too, and the source of an export."""
    run = tmp_path / "run"
    shutil.copytree(published, run)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["plan"]["latencies"] = "/home/me/secret/times.json"
    recipe["features"] = [{"sae": "/home/me/secret/sae", "site": "L0.resid_post"}]
    recipe["behaviors"] = [{"name": "x", "file": "/home/me/secret/x.yaml"}]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run / "model" / "export.json").write_text(json.dumps({"source": "/home/me/secret/model", "bytes": 3}))
    files = prepare(run, "me/tiny", base="org/base").files
    assert not [name for name, content in files.items() if isinstance(content, bytes) and b"secret" in content]
    assert b"times.json" in files["recipe.yaml"] and b'"source": "model"' in files["export.json"]  # pyright: ignore


def test_paths_become_names() -> None:
    document = {"text": {"path": "/home/me/secret/text.txt", "n": 3}, "rows": ["~/x/y.txt", "a/b", "C:\\x\\y.txt", "/"]}
    assert scrubbed(document) == {"text": {"path": "text.txt", "n": 3}, "rows": ["y.txt", "a/b", "y.txt", ""]}
