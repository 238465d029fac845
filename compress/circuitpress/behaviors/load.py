"""Files of behaviors: YAML for several of them, JSON lines for the pairs of one.

A YAML file holds a list (or a mapping with the key `behaviors`) of entries, each with a `name` and one source:

- `pairs:` a list of {clean, corrupted, answer, wrong}; `sentences:` of {good, bad}; `texts:` of strings,
- `file:` a .jsonl with such rows (BLiMP's `sentence_good` and `sentence_bad` are understood), relative to the YAML,
- `generator:` a name from `generate.GENERATORS`, with its options beside it; it fits the prompts to the tokenizer.

`metric` overrides the source's own. A .jsonl file by itself is one behavior named after the file. Every problem of a
file is found before any is shown, each with its line.
"""

import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml

from ..errors import CircuitpressError, RecipeError
from .build import Contrast, Minimal, Unfit, build_pairs, build_sentences, build_texts
from .types import Behavior, Metric, Pairs, Sentences

if TYPE_CHECKING:
    import transformers


Row = tuple[int, Mapping[str, Any]]
"""A line number, from 1, and what stands there."""

_LINE = "__line__"
_CONTRAST = ("clean", "corrupted", "answer", "wrong")
_MINIMAL = ("good", "bad")
_KINDS = (_CONTRAST, _MINIMAL, ("text",))
_BLIMP = {"sentence_good": "good", "sentence_bad": "bad"}
_SOURCES = ("pairs", "sentences", "texts", "file", "generator")
_STARTER = "see recipes/behaviors/builtin.yaml for the form"
_HINT = "fix the lines above; `circuitpress check MODEL --behaviors FILE` shows what is left"


def load_behaviors(
    path: Path, tokenizer: "transformers.PreTrainedTokenizerBase", *, unfit: dict[str, str] | None = None
) -> list[Behavior]:
    """The behaviors of a .yaml, .yml or .jsonl file, for this tokenizer.

    `unfit`, where given, takes the names and reasons of generators that this tokenizer cannot serve; without it they
    are problems like any other. Raises RecipeError, whose `problems` name every fault of the file with its line.
    """
    problems: list[str] = []
    behaviors: list[Behavior] = []
    if path.suffix == ".jsonl":
        rows = _read_jsonl(path, problems)
        entries: list[Mapping[str, Any]] = [{"name": path.stem, _LINE: 1, "rows": rows, "rows_of": path}]
    else:
        entries = _read_yaml(path)
    names: dict[str, int] = {}
    for entry in entries:
        line, name = entry.get(_LINE, 1), entry.get("name")
        where = f"{path}:{line}"
        if not isinstance(name, str) or not name:
            problems.append(f"{where}: a behavior needs a name")
            continue
        if name in names:
            problems.append(f"{where}: the name {name!r} appears twice, first in line {names[name]}")
        names.setdefault(name, line)
        behavior = _one(entry, name, path, tokenizer, problems, unfit)
        if behavior is not None:
            behaviors.append(behavior)
    if not entries:
        problems.append(f"{path}: no behavior in it")
    if problems:
        raise RecipeError(problems, hint=_HINT)
    return behaviors


def _one(
    entry: Mapping[str, Any], name: str, path: Path, tokenizer: "transformers.PreTrainedTokenizerBase",
    problems: list[str], unfit: dict[str, str] | None,
) -> Behavior | None:  # fmt: skip
    """One behavior; what is wrong with it is added to `problems`."""
    from .generate import generate

    where = f"{path}:{entry.get(_LINE, 1)}: {name}"
    before = len(problems)
    metric = entry.get("metric")
    if metric is not None and metric not in get_args(Metric):
        problems.append(f"{where}: metric {metric!r} is not one of {', '.join(get_args(Metric))}")
    given = ["generator"] if "generator" in entry else [source for source in _SOURCES if source in entry]
    if "rows" not in entry and len(given) != 1:
        found = ", ".join(given) or "none"
        problems.append(f"{where}: needs exactly one of {', '.join(_SOURCES)} (found {found})")
        return None
    if given == ["generator"]:
        fixed = ("name", "generator", "metric", _LINE)
        options = {key: value for key, value in entry.items() if key not in fixed}
        try:
            made = generate(str(entry["generator"]), name, tokenizer, options, folder=path.parent)
        except CircuitpressError as error:
            if isinstance(error, Unfit) and unfit is not None:
                unfit[name] = error.message
                return None
            problems += [f"{where}: {line}" for line in error.message.splitlines()]
            return None
        return _with_metric(made, metric, where, problems) if len(problems) == before else None
    allowed = {"name", "metric", "seed", *_SOURCES, "rows", "rows_of", _LINE}
    problems += [f"{where}: unknown key {key!r}" for key in entry if key not in allowed]
    seed = entry.get("seed", 0)
    if not isinstance(seed, int):
        problems.append(f"{where}: seed is {seed!r}, not a number")
        seed = 0
    rows, source = _rows(entry, where, path, problems)
    pairs, kind = _build(rows, source, tokenizer, seed, problems)
    if pairs is None or len(problems) > before:
        if len(problems) == before:
            problems.append(f"{where}: has no pairs")
        return None
    made = Behavior(name, kind, pairs, {"source": source.name, "pairs": len(pairs)})
    return _with_metric(made, metric, where, problems)


def _with_metric(behavior: Behavior, metric: Metric | None, where: str, problems: list[str]) -> Behavior | None:
    """The behavior with another metric, if that fits its kind of prompts."""
    if metric is None or metric == behavior.metric:
        return behavior
    fitting = ("sentence", "loss") if isinstance(behavior.pairs, Sentences) else get_args(Metric)[:-1]
    if metric not in fitting or behavior.metric == "loss":
        problems.append(f"{where}: metric {metric} does not fit such prompts: {' or '.join(fitting)}")
        return None
    if isinstance(behavior.pairs, Sentences):
        problems.append(f"{where}: metric loss is for texts: give them as `texts:`")
        return None
    return Behavior(behavior.name, metric, behavior.pairs, behavior.provenance)


def _rows(entry: Mapping[str, Any], where: str, path: Path, problems: list[str]) -> tuple[list[Row], Path]:
    if "rows" in entry:
        return entry["rows"], entry["rows_of"]
    if "file" in entry:
        file = path.parent / str(entry["file"])
        return _read_jsonl(file, problems), file
    key = next(source for source in _SOURCES if source in entry)
    values = entry[key]
    if not isinstance(values, list):
        problems.append(f"{where}: {key} is not a list")
        return [], path
    first = entry.get(_LINE, 1)
    return [(v.get(_LINE, first), v) if isinstance(v, dict) else (first, {"text": v}) for v in values], path


def _build(
    rows: Sequence[Row], path: Path, tokenizer: "transformers.PreTrainedTokenizerBase", seed: int, problems: list[str]
) -> tuple[Pairs | Sentences | None, Metric]:
    """Tensors of one behavior's rows, which must all be of the kind of the first one that has a kind."""
    rows = [(line, {_BLIMP.get(key, key): value for key, value in row.items()}) for line, row in rows]
    kind = next((fields for _, row in rows for fields in _KINDS if fields[0] in row), _CONTRAST)
    usable: list[Row] = []
    for line, row in rows:
        if missing := [field for field in kind if not isinstance(row.get(field), str)]:
            problems.append(f"{path}:{line}: a row needs the texts {', '.join(kind)} (missing: {', '.join(missing)})")
        else:
            usable.append((line, row))
    if kind == _CONTRAST:
        metric = "logit_diff"
        pairs, faults = build_pairs([Contrast(*(row[field] for field in kind)) for _, row in usable], tokenizer)
    elif kind == _MINIMAL:
        metric = "sentence"
        pairs, faults = build_sentences([Minimal(*(row[field] for field in kind)) for _, row in usable], tokenizer)
    else:
        metric = "loss"
        pairs, faults = build_texts([row["text"] for _, row in usable], tokenizer, seed=seed)
    problems += [f"{path}:{usable[fault.index][0]}: {fault.message}" for fault in faults]
    return pairs, metric


class _NumberedLoader(yaml.SafeLoader):
    """safe_load that keeps the line of every mapping under `__line__`, and refuses a key that appears twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep=deep) | {_LINE: node.start_mark.line + 1}


def _read_yaml(path: Path) -> list[Mapping[str, Any]]:
    try:
        document = yaml.load(_read(path), Loader=_NumberedLoader)  # noqa: S506 (a subclass of SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError([f"{where}: {error.problem}"], hint="fix this line of the file") from error
    except yaml.YAMLError as error:
        raise RecipeError([f"{path}: not YAML: {error}"], hint=_STARTER) from error
    if isinstance(document, dict) and "behaviors" in document:
        document = document["behaviors"]
    elif isinstance(document, dict) and "name" in document:
        document = [document]
    if not isinstance(document, list) or not all(isinstance(entry, dict) for entry in document):
        raise RecipeError([f"{path}: not a list of behaviors"], hint=_STARTER)
    return list(document)


def _read_jsonl(path: Path, problems: list[str]) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            problems.append(f"{path}:{number}: not JSON: {error}")
            continue
        if isinstance(row, dict):
            rows.append((number, row))
        else:
            problems.append(f"{path}:{number}: not an object")
    return rows


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError([f"cannot read the behaviors {path}: {reason}"], hint=_STARTER) from error
