"""A model folder becomes a repository on the Hub: gathered and checked first, then one commit.

1. `prepare` decides what goes up, under which name in the repository, and writes the card. It sends nothing.
2. `send` uploads large files one by one and commits everything at once, so that nobody ever sees half a model. A file
   that has arrived is not sent again: after an interruption the same command goes on.

Private things stay at home: no paths of the machine, no hidden files, and no pickles at all.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..console import Advance, ignore
from ..errors import CircuitpressError
from .card import Evidence, gather, hub_base, model_card, public_recipe, scrubbed
from .licence import terms_of

_REFUSED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
_CARRIED = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class Upload:
    """What would go to `repo`: path in the repository -> a local file, or the bytes themselves."""

    repo: str
    revision: str | None
    private: bool
    files: Mapping[str, Path | bytes]
    warnings: tuple[str, ...]

    @property
    def card(self) -> str:
        """The text of README.md."""
        card = self.files["README.md"]
        assert isinstance(card, bytes)
        return card.decode()

    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in sorted(self.files.items())
        }


def prepare(
    folder: Path, repo: str, *, base: str | None = None, licence: str | None = None, private: bool = False,
    revision: str | None = None,
) -> Upload:  # fmt: skip
    """Everything about an upload but the upload.

    `base` is the Hub id of the original, for a recipe that names a local folder; `licence` its licence id, where the
    original does not say. Raises CircuitpressError that lists everything that forbids publishing.
    """
    evidence = gather(folder)
    model = evidence.model
    original = Path(str(evidence.run.recipe.get("model", ""))) if evidence.run else None
    base = base or hub_base(evidence)
    terms = terms_of(model, *([original] if original and original.is_dir() else []), licence=licence)
    files = _model_files(model)
    for pattern in _CARRIED if original and original.is_dir() else ():
        files |= {file.name: file for file in original.glob(pattern) if file.name not in files}  # pyright: ignore
    problems = _problems(repo, base, model, files)
    problems += terms.problems(repo.rpartition("/")[2], tuple(files))
    if problems:
        raise CircuitpressError("\n".join(problems), hint="see circuitpress push --help")
    added: dict[str, Path | bytes] = {"README.md": model_card(evidence, repo, base=base, terms=terms).encode()}
    added |= _evidence_files(evidence, base)
    if "export.json" in files:
        added["export.json"] = _json(scrubbed(json.loads(files["export.json"].read_text())))
    warnings = [] if base else ["the card names no base model: add --base user/name"]
    warnings += [] if terms.licence else ["the licence of the original is unknown: add --licence ID"]
    return Upload(repo, revision, private, {**files, **added}, tuple(warnings))


def send(upload: Upload, *, advance: Advance = ignore) -> str:
    """Uploads and commits; the URL of the commit. `advance` hears of every file, as its share of the bytes.

    Raises CircuitpressError for a missing or wrong token and for a connection that breaks, with what to do next.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(library_name="circuitpress")
    sizes = upload.sizes()
    total = sum(sizes.values())
    done = 0
    try:
        api.create_repo(upload.repo, private=upload.private, exist_ok=True)
        if upload.private and not api.model_info(upload.repo).private:
            raise CircuitpressError(
                f"{upload.repo} is there already and public; nothing was sent",
                hint="make it private in its settings on the Hub, or push to another name",
            )
        if upload.revision:
            api.create_branch(upload.repo, branch=upload.revision, exist_ok=True)
        operations = []
        for name, content in upload.files.items():
            operation = CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            if isinstance(content, Path):
                api.preupload_lfs_files(upload.repo, [operation], revision=upload.revision)
            operations.append(operation)
            done += sizes[name]
            advance(sizes[name] / max(total, 1), f"{name}, {done / 1e6:.1f} of {total / 1e6:.1f} MB")
        commit = api.create_commit(
            upload.repo, operations, commit_message="Upload a model compressed by circuitpress",
            revision=upload.revision,
        )  # fmt: skip
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        raise CircuitpressError(_refusal(upload.repo, status, error), hint=_next(status)) from error
    except OSError as error:
        raise CircuitpressError(
            f"the upload to {upload.repo} broke off after {done / 1e6:.1f} of {total / 1e6:.1f} MB: {error}",
            hint="the same command goes on: what has arrived is not sent again",
        ) from error
    return str(commit.commit_url)


def _model_files(model: Path) -> dict[str, Path]:
    files = (file for file in model.rglob("*") if file.is_file())
    names = {file.relative_to(model).as_posix(): file for file in files}
    return {
        name: file
        for name, file in names.items()
        if not any(part.startswith(".") for part in name.split("/")) and name != "README.md"
    }


def _problems(repo: str, base: str | None, model: Path, files: Mapping[str, Path]) -> list[str]:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    problems = []
    for what, name in (("repository", repo), ("base model", base)):
        if name is None:
            continue
        try:
            validate_repo_id(name)
            if name.count("/") != 1:
                raise HFValidationError("it is written user/name")
        except HFValidationError as error:
            problems.append(f"{name!r} is no name of a {what}: {error}")
    pickles = [name for name in files if name.endswith(_REFUSED)]
    problems += [f"{name} may run code where it is loaded: only safetensors are published" for name in pickles]
    index = model / "model.safetensors.index.json"
    if index.is_file():
        missing = sorted({*json.loads(index.read_text())["weight_map"].values()} - {*files})
        problems += [f"{name} is missing: the model is not whole" for name in missing]
    elif not any(name.endswith(".safetensors") for name in files):
        problems.append(f"{model} has no safetensors")
    return problems


def _evidence_files(evidence: Evidence, base: str | None) -> dict[str, bytes]:
    run = evidence.run
    if run is None:
        return {}
    found = {"recipe.yaml": public_recipe(run, base).encode()}
    for name in ("plan.json", "evaluate/fidelity.json", "evaluate/behaviors.json", "evaluate/tasks.json"):
        if (run.folder / name).is_file():
            found[name] = _json(scrubbed(json.loads((run.folder / name).read_text())))
    return found | _leaderboard(evidence)


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()


def _leaderboard(evidence: Evidence) -> dict[str, bytes]:
    """`.eval_results/NAME.yaml` for tasks whose data is a Hub dataset: the Hub shows those beside the model."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    entries: dict[str, list[EvalResultEntry]] = {}
    for row in evidence.tasks.get("rows", []):
        if row["asked"] and (dataset := row.get("dataset")):
            notes = f"{row['shots']}-shot, lm-evaluation-harness {evidence.tasks['provenance']['lm_eval']}"
            task = f"{row['task']}:{row['metric']}"
            entries.setdefault(dataset, []).append(EvalResultEntry(dataset, task, row["value"], notes=notes))
    return {
        f".eval_results/{dataset.replace('/', '--')}.yaml": _yaml(eval_result_entries_to_yaml(found))
        for dataset, found in entries.items()
    }


def _yaml(document: Any) -> bytes:
    import yaml

    return yaml.safe_dump(document, sort_keys=False).encode()


def _refusal(repo: str, status: int | None, error: Exception) -> str:
    reasons = {401: "the token is missing or wrong", 403: "the token may not write there"}
    return f"the Hub refuses the upload to {repo}: {reasons.get(status or 0) or error}"


def _next(status: int | None) -> str:
    if status in (401, 403):
        return "hf auth login, with a token that may write; then the same command again"
    return "the same command goes on: what has arrived is not sent again"
