"""The command `export`: a finished model for another runtime."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..console import Console
from ..errors import CheckpointError, RecipeError
from ..recipe import Recipe
from .folder import open_folder
from .session import Session

if TYPE_CHECKING:
    import circuitpress.export

Result = tuple[str, dict[str, Any]]


def export_model(
    model: Path, target: str, out: Path, console: Console, *, dtype: str | None = None, dry_run: bool = False,
    device: str | None = None,
) -> Result:  # fmt: skip
    """Writes the model folder `model` for `target` to `out`; text for people and the content of export.json."""
    import torch

    from ..export import export, open_source, preview

    source = open_source(model)
    if target == "gguf":
        return _export_gguf(source, out, console, dtype=dtype, dry_run=dry_run, device=device)
    if dry_run:
        document = preview(source, target, out)
        return _describe(document) + f"\nnothing was written; without --dry-run: {out}", document
    outer = sum(matrix.numel for matrix in source.anatomy.outer)
    with console.progress("export", (outer, *source.anatomy.work)) as advance:
        kind = getattr(torch, dtype) if dtype else None
        document = export(source, target, out, dtype=kind, advance=advance)
    document |= {"out": str(out)}
    return f"{_describe(document)}\n{_verdict(document)}\n{out}: {document['bytes']:,} bytes", document


def _export_gguf(
    source: "circuitpress.export.Source", out: Path, console: Console, *, dtype: str | None, dry_run: bool,
    device: str | None,
) -> Result:  # fmt: skip
    from ..export.gguf import PACKAGE, commands, write_gguf
    from ..export.write import publish, refuse_foreign, require, verify
    from ..plan.targets import plan_problems

    if dtype:
        hint = "leave --dtype out: convert_hf_to_gguf.py has --outtype"
        raise RecipeError(["--dtype: gguf takes the model as it is"], hint=hint)
    stored = source.stored()
    if problems := plan_problems("gguf", stored):
        hint = "score and plan for it: circuitpress run RECIPE --set plan.target=gguf"
        raise RecipeError([f"{source.folder} cannot be gguf:", *problems[:8]], hint=hint)
    require(PACKAGE)
    refuse_foreign(out)
    run = source.folder.resolve().parent
    if not (run / "recipe.yaml").is_file() or not (run / "pricing").is_dir():
        hint = "export from the run folder: runs/NAME/model"
        raise CheckpointError(
            f"{source.folder} is in no run folder, whose Hessians make the importance matrix", hint=hint
        )
    document: dict[str, Any] = {"format": "gguf", "source": str(source.folder)}
    if dry_run:
        return f"gguf from {run}\nnothing was written; without --dry-run: {out}", document
    candidate = out.with_name(f".{out.name}.unchecked")
    with open_folder(run, create=False) as folder:
        recipe = Recipe.load(run / "recipe.yaml", overrides=[f"run.device={device}"] if device else [])
        session = Session(folder, recipe, console)
        windows = session.windows[0]
        count, length = windows.ids.shape
        try:
            document |= write_gguf(
                session.anatomy, stored, _diagonals(session), candidate, windows=count, length=length,
                text=json.dumps(windows.describe(), sort_keys=True),
            )  # fmt: skip
            document |= verify(session.working, candidate)
            publish(candidate, out, document)
        finally:
            shutil.rmtree(candidate, ignore_errors=True)
    # Not in export.json, which may be pushed: they name folders of this machine.
    document |= {"out": str(out), "commands": commands(session.anatomy, out)}
    counts = {kind: list(document["types"].values()).count(kind) for kind in dict.fromkeys(document["types"].values())}
    lines = [f"gguf: {_counted(counts)}", _verdict(document), f"{out}; next, in the folder of llama.cpp:"]
    return "\n".join([*lines, *document["commands"]]), document


def _diagonals(session: Session) -> dict[str, NDArray[np.float32]]:
    """The diagonals of all Hessians as priced; those of a large model take one walk."""
    from ..price import has_hessians, load_hessians
    from ..rounding import block_hessians, context
    from ..stream import forward

    stream, saliency = session.stream, session.path / "pricing"
    found: dict[str, Any] = {}
    if has_hessians(saliency):
        for place in stream.anatomy.blocks:
            found |= load_hessians(saliency, place, stream.device)
    else:
        batches = stream.batches(context(session.windows[0].ids, saliency))
        store = stream.store("export")

        def visit(index: int, module: Any, inputs: Any) -> None:
            place = stream.anatomy.blocks[index]
            hessians = block_hessians(stream, module, place, inputs, len(batches), saliency)
            found.update({name: hessian.diagonal().clone() for name, hessian in hessians.items()})

        try:
            with session.console.progress("importance", stream.depth) as advance:
                forward(stream, batches, store, visit=visit, advance=advance)
        finally:
            store.clear()
    return {name: (h.diagonal() if h.dim() == 2 else h).float().cpu().numpy() for name, h in found.items()}


def _describe(document: dict[str, Any]) -> str:
    lines = [f"{document['format']}: {_counted(document['matrices'])}"]
    if advice := document["advice"]:
        lines.append(f"vLLM: {len(advice)} matrices do not fit its fast kernel; {advice[0]}")
    return "\n".join(lines)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} matrices {name}" for name, count in counts.items())


def _verdict(document: dict[str, Any]) -> str:
    check = document["check"]
    text = (
        f"loaded in a fresh process: logits differ by {check['max_logit_error']:.2g} at most, of up to "
        f"{check['largest_logit']:.3g}"
    )
    if as_is := check["as_is"]:
        text += f"; with activations in 8 bits by {as_is['max_logit_error']:.2g} (KL {as_is['kl']:.2g})"
    return text
