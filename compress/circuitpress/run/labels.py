"""What `sae explain` and `sae labels` do: write prompts that ask for labels of features, and score labels.

Both halves of the text come from one draw of windows: prompts show the first, exams the second. A row of prompts.jsonl
carries how it was drawn, so that labels written into these rows cannot be tested on the text that they were made from.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import resolve_checkpoint
from ..console import Console, table
from ..errors import CircuitpressError, RecipeError
from ..files import write_bytes_atomic
from .opening import Opened, open_model
from .saes import in_range, open_sae, spread
from .session import choose_device, load_tokenizer

if TYPE_CHECKING:
    import torch

    import circuitpress.mech.sae.labels

Result = tuple[str, dict[str, Any]]
FORM = 'rows are {"feature": 12, "label": "names of rivers"}'
BATCH = 8
"""Prompts that the judge reads at once."""


def explain_features(
    model: str, sae_folder: Path, console: Console, *, out: Path, features: Sequence[int], count: int, shown: int,
    site: str | None, text: Path | None, windows: int, length: int, seed: int, device: str | None,
) -> Result:  # fmt: skip
    """Writes prompts.jsonl: a row a feature with `feature`, an empty `label`, the `prompt`, and how it was drawn."""
    from ..mech.examples import activating
    from ..mech.sae.judge import own_site
    from ..mech.sae.labels import explain

    opened = open_model(model, device=device, spill=None)
    sae = open_sae(sae_folder, site, opened)
    first, _, drawn = _halves(opened, text, windows, length, seed)
    picked = in_range(features, sae) or spread(opened, sae, first, count)
    with console.progress("features", own_site(sae).layer + 1) as advance:
        rows = activating(
            opened.stream, first, own_site(sae), [str(index) for index in picked],
            lambda _: lambda x: sae.encode(x)[0][..., picked], count=shown, skip=sae.skip, advance=advance,
        )  # fmt: skip
    lines = [
        {"feature": int(row.part), "label": "", "prompt": explain(row, opened.decode), "drawn": drawn}
        for row in rows
        if row.top
    ]
    silent = [int(row.part) for row in rows if not row.top]
    path = out / "prompts.jsonl"
    write_bytes_atomic(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    told = f"{path}: {len(lines)} prompts" + (f"; silent on this text: {silent}" if silent else "")
    following = f"circuitpress sae labels {model} {sae_folder} --labels {path} --judge JUDGE --out {out}"
    document = {"prompts": str(path), "features": [line["feature"] for line in lines], "silent": silent, "drawn": drawn}
    return f"{told}\nfill in `label` with what a model or a person answers, then: {following}", document


def score_labels(
    model: str, sae_folder: Path, console: Console, *, labels: Path, judge: str, out: Path, texts: int,
    site: str | None, text: Path | None, windows: int, length: int, seed: int, device: str | None,
) -> Result:  # fmt: skip
    """Writes labels.json: how well each label, and another feature's, tells where the feature fires on other text."""
    from ..mech.examples import values_of
    from ..mech.sae.formats import describe
    from ..mech.sae.judge import own_site
    from ..mech.sae.labels import detection, exam

    opened = open_model(model, device=device, spill=None)
    sae = open_sae(sae_folder, site, opened)
    _, second, drawn = _halves(opened, text, windows, length, seed)
    given = _read_labels(labels, drawn)
    picked = in_range(list(given), sae)
    with console.progress("features", own_site(sae).layer + 1) as advance:
        values = values_of(
            opened.stream, second, own_site(sae), lambda _: lambda x: sae.encode(x)[0][..., picked], skip=sae.skip,
            advance=advance,
        )  # fmt: skip
    found = [
        exam(feature, second, values[..., i], opened.decode, count=texts, skip=sae.skip, seed=seed)
        for i, feature in enumerate(picked)
    ]
    exams = [one for one in found if one is not None]
    missing = [feature for feature, one in zip(picked, found, strict=True) if one is None]
    named = [given[one.feature] for one in exams]
    if len(set(named)) < 2:
        message = (
            f"{labels}: {len(set(named))} labels of features that fire on some windows of this text and not on all"
        )
        raise CircuitpressError(message, hint="the control needs two: label more features, or pass more --windows")
    asked = open_judge(judge, device=device)
    with console.progress("detection", len(exams)) as advance:
        rows = detection(exams, named, asked, seed=seed, advance=advance)
    own, control = (sum(getattr(row, key) for row in rows) / len(rows) for key in ("accuracy", "control"))
    document = {
        "model": model, "sae": describe(sae), "judge": judge, "drawn": drawn, "status": "unproven",
        "evidence": "correlational", "accuracy": own, "control": control, "left_out": missing,
        "cannot_prove": "A label that tells where a feature fires on this text need not say what the feature is, nor "
        "what the model does with it.",
        "labels": [asdict(row) for row in rows],
    }  # fmt: skip
    write_bytes_atomic(out / "labels.json", (json.dumps(document, indent=1) + "\n").encode())
    lines: list[tuple[str, ...]] = [("feature", "label (unproven)", "balanced accuracy", "another's label", "texts")]
    for row in sorted(rows, key=lambda row: -row.accuracy):
        lines.append((str(row.feature), row.label[:48], f"{row.accuracy:.2f}", f"{row.control:.2f}", str(row.texts)))
    lines.append(("mean", "", f"{own:.2f}", f"{control:.2f}", ""))
    left = f"\nleft out, fire nowhere or everywhere: {missing}" if missing else ""
    return f"{table(f'labels of {sae_folder}, judged by {judge}', lines)}{left}\n\n{out / 'labels.json'}", document


def open_judge(judge: str, *, device: str | None) -> "circuitpress.mech.sae.labels.Judge":
    """Any causal language model that transformers loads, as a judge of `labels.question`.

    Prompts go through its chat template where it has one. CircuitpressError if yes and no begin with one token.
    """
    import torch
    import transformers

    folder = resolve_checkpoint(judge)
    tokenizer = load_tokenizer(folder)
    where = choose_device(device or "auto")
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype="auto").to(where).eval()

    def ids_of(prompt: str) -> list[int]:
        if not tokenizer.chat_template:
            return list(tokenizer(prompt)["input_ids"])  # pyright: ignore
        turn = [{"role": "user", "content": prompt}]
        text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore

    space = "" if tokenizer.chat_template else " "
    answers = [tokenizer(space + word, add_special_tokens=False)["input_ids"][:1] for word in ("Yes", "No")]  # pyright: ignore
    if not all(answers) or answers[0] == answers[1]:
        hint = "name a judge whose tokenizer tells them apart"
        raise CircuitpressError(f"{judge}: Yes and No begin with the same token", hint=hint)
    yes, no = (answer[0] for answer in answers)

    @torch.no_grad()
    def ask(prompts: Sequence[str]) -> list[float]:
        result: list[float] = []
        for start in range(0, len(prompts), BATCH):
            rows = [ids_of(prompt) for prompt in prompts[start : start + BATCH]]
            longest = max(map(len, rows))
            # Padded on the right: nothing before the padding sees it.
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=where)
            last = torch.tensor([len(row) - 1 for row in rows], device=where)
            logits = model(ids, use_cache=False).logits[torch.arange(len(rows), device=where), last]
            result += (logits[:, yes] - logits[:, no]).float().tolist()
        return result

    return ask


def _halves(
    opened: Opened, text: Path | None, windows: int, length: int, seed: int
) -> tuple["torch.Tensor", "torch.Tensor", dict[str, Any]]:
    """Windows for prompts, windows for exams, and how both were drawn."""
    from ..data import split

    found = opened.windows(text, samples=windows, length=length, seed=seed)
    first, second = split(found, windows // 2, windows - windows // 2)
    return first.ids, second.ids, {"text": found.text_sha256, "ids": found.ids_sha256, "seed": seed}


def _read_labels(path: Path, drawn: dict[str, Any]) -> dict[int, str]:
    """Feature to label of a .jsonl; rows without a label are passed over. RecipeError with every fault."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError([f"cannot read the labels {path}: {error}"], hint=FORM) from error
    found: dict[int, str] = {}
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            feature, label = row["feature"], row["label"]
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"{path}:{number}: not a label: {error!r}")
            continue
        if not isinstance(feature, int) or not isinstance(label, str):
            problems.append(f"{path}:{number}: feature must be a number and label a text")
        elif feature in found:
            problems.append(f"{path}:{number}: feature {feature} has a label already")
        elif row.get("drawn", drawn) != drawn:
            problems.append(f"{path}:{number}: its prompt was drawn from other windows, which may be those of the exam")
        elif label.strip():
            found[feature] = label
    if problems:
        hint = f"{FORM}; pass the --text, --windows, --length and --seed that `sae explain` had"
        raise RecipeError(problems, hint=hint)
    return found
