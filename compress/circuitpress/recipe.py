"""The recipe: everything a user asks for, in one frozen, typed value. No torch here.

1. The YAML file is read with `safe_load`; a key that appears twice is an error: YAML would drop one in silence.
2. `--set plan.budget=2.5bpw` overrides are laid over it; their values are YAML too.
3. pydantic checks the whole (unknown keys forbidden), with relative paths resolved against the recipe's folder, so that
   a recipe means the same from every working directory.
4. Every problem is reported at once, each on a line that begins with the dotted key; an unknown key names the nearest.
"""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, ValidationError, model_validator

from .errors import RecipeError
from .fields import (
    Budget,
    LocalFile,
    LocalFolder,
    LocalPath,
    ModelName,
    OfferName,
    OuterName,
    ProbeName,
    Uniform,
    UnitName,
)
from .menu import MENU, OUTER_FORMAT, PROBES, TARGET_FORMATS, TARGET_MENUS, refuse_formats
from .yamltext import read_yaml


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Data(_Section):
    """The texts: what is calibrated on and what is measured on."""

    calibration: LocalFile | None = None
    """Text that prices and rounding are computed on; without it, the text that comes with circuitpress."""
    test: LocalFile | None = None
    """Text that the result is measured on; without it, windows of the calibration text that nothing else uses."""
    format: Literal["text", "chat"] = "text"
    """`chat` runs the tokenizer's chat template over rows of {"messages": [...]} (jsonl) or over plain text."""
    samples: int = Field(default=128, ge=1)
    """Calibration windows."""
    length: int = Field(default=512, ge=2)
    """Tokens in a window."""
    seed: int = 0
    """Chooses the windows and draws the labels."""
    bos: Literal["auto", "never", "always"] = "auto"
    """Begin every window with the BOS token; `auto` does what the tokenizer itself does."""


class Score(_Section):
    """How parts are scored and how far the scores are checked."""

    methods: tuple[Literal["fisher"], ...] = Field(default=("fisher",), min_length=1)
    """Scoring methods."""
    exact: float = Field(default=0.1, ge=0, le=1)
    """Fraction of the groups whose price is checked by changing only that group and measuring KL."""
    draws: int = Field(default=1, ge=1)
    """Label draws per token; more draws, less noise, proportionally more time."""


class Plan(_Section):
    """What may be spent, and on what."""

    budget: Budget = "3.0bpw"
    """Bits per weight (3.0bpw), percent of the 16-bit linear weights (40%), bytes of all files (900MB), or the time of
    the linear maps of one step (12ms@batch1), for which `latencies` is needed."""
    latencies: LocalFile | None = None
    """Times of formats on the machine that will run the model: what `circuitpress bench kernels --save` writes."""
    target: Literal["native", "compressed-tensors", "bitsandbytes", "gguf", "dense"] = "native"
    """The runtime that the plan is for: its rules bind the plan, and formats default to its menu. `export` writes it;
    `dense` admits everything and is exported as 16-bit numbers."""
    granularity: Literal["matrix", "unit"] = "matrix"
    """One format a matrix, or one for every run of rows or columns that belongs to a KV group or neuron block."""
    formats: tuple[OfferName, ...] = Field(default=MENU, min_length=1)
    """Formats on offer; int4g32 names its own group size. With `drop` among them, neurons and KV groups may be pruned
    where that loses less than fewer bits do: widths are searched for, and every candidate is built and measured."""
    protect: tuple[UnitName, ...] = ()
    """Units, layers or modules that keep a good format whatever it costs, such as L3.head.2."""
    floors: dict[int, float] = {}
    """The least bits per weight of single layers, such as {0: 3, 1: 3}."""
    outer: OuterName = "auto"
    """Format of embedding and lm_head. `auto` leaves them as they are under a budget in bits per weight or percent,
    which counts decoder blocks only, and lets a budget in bytes choose."""
    probes: tuple[ProbeName, ...] = PROBES
    """Plans that are measured to correct the additive prediction: sizes (2.5bpw, the best plan of that size) and
    formats (int3, all matrices in it); empty for none."""
    swaps: int = Field(default=40, ge=0)
    """Plans around the optimum that are measured to find better ones than prices alone can; 0 for none. About as long
    as scoring; 5 to 7 % less KL below 3 bits, about 1 % above (stories260K, babyllama-105)."""

    @model_validator(mode="before")
    @classmethod
    def _menu_of_target(cls, values: object) -> object:
        if isinstance(values, dict) and "formats" not in values and values.get("target") in TARGET_MENUS:
            return values | {"formats": TARGET_MENUS[values["target"]]}
        return values


class Prune(_Section):
    """What leaves before bits are spent, for a user who knows; `drop` in plan.formats lets the planner choose."""

    neurons: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the neurons that leaves each layer."""
    kv_groups: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the key-value groups that leaves each layer, with the query heads that read them; one stays."""
    heterogeneous: Uniform = False
    """Different widths in different layers; refused, since no config.json of transformers can say that."""

    @property
    def is_asked(self) -> bool:
        """Whether anything leaves."""
        return self.neurons > 0 or self.kv_groups > 0


class Quantize(_Section):
    """How weights are rounded."""

    group_size: int = Field(default=64, ge=1)
    """Consecutive input columns that share a scale, for formats that do not name their own."""
    polish: bool = True
    """Improve codes and scales after rounding by coordinate descent: 5 to 13 % less KL for 2.4 times the rounding."""
    correct: bool = False
    """Round for the inputs that the model will meet behind its own rounded prefix: about a quarter less KL on text like
    the calibration text, less elsewhere; several forward passes more for every plan that is measured or made."""


class Refine(_Section):
    """Learning codes, scales and norms together after rounding; all of the model is in memory, at 20 bytes a weight."""

    steps: int = Field(default=0, ge=0)
    """Steps of about 2048 tokens; 0 leaves the codes as rounding chose them."""
    written: int = Field(default=256, ge=0)
    """Windows that the original itself writes, to learn from beside the calibration text."""


class KeptBehavior(_Section):
    """A behavior that the compressed model must still have."""

    name: Annotated[str, StringConstraints(pattern=r"^[\w.-]+$")]
    """Its name in the file."""
    file: LocalFile
    """YAML or JSON lines; `circuitpress check MODEL --behaviors FILE` shows what is in it."""
    keep: float = Field(default=0.98, gt=0, le=1)
    """Share of what the original does that must be left, on pairs that nothing was fitted to; else exit code 4."""
    of: Literal["accuracy", "margin"] = "accuracy"
    """What the share is of: right decisions, or their mean margin (a difference of logits or log-probabilities)."""
    weight: float = Field(default=0.0, ge=0)
    """How much a prediction of the behavior weighs against one of the text when weights are rounded and refined. At 1
    rounding fits the pairs that it sees: on stories260K the others then lose no less, and text 8 to 10 % more. Rounding
    that leans (`circuitpress.lean`) does without: at .1 it wins half as much margin for as much KL."""


class FeatureSet(_Section):
    """Features of a sparse autoencoder that rounding should spare beside the text; an experiment, off by default."""

    sae: LocalPath
    """A folder of SAELens or sparsify, or a Gemma Scope file; `circuitpress sae train` makes one."""
    site: str | None = Field(default=None, pattern=r"^L\d+\.resid_(pre|post)$")
    """Where it reads, such as L4.resid_post; without it, what its folder says."""
    top: int = Field(default=256, ge=1)
    """How many features: those that it costs most to close."""
    weight: float = Field(default=1.0, ge=0)
    """How much a nat that is lost through them weighs against one of the text when weights are rounded."""


class Evaluate(_Section):
    """What is measured at the end, and what must be reached."""

    windows: int = Field(default=64, ge=1)
    """Test windows; also the number of held-out windows that probes are measured on."""
    max_kl: float | None = Field(default=None, gt=0)
    """Exit with code 4 if the measured KL, in nats per token, is above this."""
    min_top1: float | None = Field(default=None, ge=0, le=1)
    """Exit with code 4 if the top-1 agreement is below this."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness that the original and the result are compared on."""
    include: LocalFolder | None = None
    """A folder with task YAMLs of your own."""
    task_data: LocalFolder | None = None
    """Where relative data files of those start from; without it, the working directory."""
    shots: int | None = Field(default=None, ge=0)
    """Examples in a prompt; without it, as the task says."""
    limit: int | None = Field(default=None, ge=1)
    """Documents of each task; without it, all."""
    chat_template: bool = False
    """Put the tokenizer's chat template around prompts."""
    min_recovery: float | None = Field(default=None, gt=0)
    """Exit with code 4 if less than this share of the original's scores is left, on average over the tasks."""


class Machine(_Section):
    """Where and in which precision the passes run."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """`auto` takes a GPU when there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto` computes as the engine thinks best for the checkpoint and the device."""


class Recipe(_Section):
    """A whole run; every key but `model` has a default."""

    version: Literal[1] = Field(default=1, alias="schema")
    """Version of this schema."""
    model: ModelName
    """A checkpoint folder, or a Hub id with an optional @revision."""
    data: Data = Data()
    score: Score = Score()
    behaviors: tuple[KeptBehavior, ...] = ()
    """What the compressed model must still be able to do."""
    features: tuple[FeatureSet, ...] = ()
    """Features that rounding should spare, beside the text."""
    plan: Plan = Plan()
    prune: Prune = Prune()
    quantize: Quantize = Quantize()
    refine: Refine = Refine()
    evaluate: Evaluate = Evaluate()
    run: Machine = Machine()

    @model_validator(mode="after")
    def _one_way_to_prune(self) -> Self:
        formats = [name for name in self.plan.formats if name != "drop"]
        if not formats:
            raise ValueError("plan.formats: drop alone is no format: offer one for the weights that stay")
        if self.prune.is_asked and len(formats) < len(self.plan.formats):
            raise ValueError("prune: fractions are given, and drop in plan.formats asks to search for them: keep one")
        return self

    @model_validator(mode="after")
    def _what_the_target_holds(self) -> Self:
        plan = self.plan
        problems = refuse_formats(plan.target, plan.formats)
        if plan.target in TARGET_FORMATS and plan.granularity != "matrix":
            problems.append(f"plan.granularity: {plan.target} holds one format a matrix")
        if plan.target in TARGET_FORMATS and OUTER_FORMAT.fullmatch(plan.outer) and plan.outer.startswith("int"):
            problems.append(f"plan.outer: {plan.target} keeps embedding and lm_head at 16 bits, or in float32")
        if plan.target == "gguf" and (self.quantize.correct or self.refine.steps):
            lost = "quantize.correct and refine would be lost in gguf"
            problems.append(f"plan.target: llama.cpp rounds the original by itself: {lost}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @classmethod
    def load(cls, path: Path, *, overrides: Sequence[str] = ()) -> Self:
        """The recipe in a YAML file with `key=value` overrides; RecipeError holds every problem."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RecipeError([f"cannot read the recipe {path}: {reason}"], hint=_STARTER) from error
        return cls.parse(text, name=str(path), folder=path.parent, overrides=overrides)

    @classmethod
    def parse(cls, text: str, *, name: str, folder: Path, overrides: Sequence[str] = ()) -> Self:
        """The recipe in a YAML text; `name` appears in messages, relative paths start at `folder`."""
        document = read_yaml(text, name)
        if not isinstance(document, dict):
            raise RecipeError([f"{name}: a recipe is a mapping of keys, found {_kind(document)}"], hint=_STARTER)
        problems = [problem for override in overrides if (problem := _apply_override(document, override))]
        try:
            recipe = cls.model_validate(_resolve_paths(document, folder.resolve()))
        except ValidationError as error:
            problems += [_explain(entry) for entry in error.errors()]
        else:
            if not problems:
                return recipe
        raise RecipeError([f"{name}: {problem}" for problem in problems], hint=_FIX)

    def to_yaml(self) -> str:
        """The recipe with every default written out and every path absolute; `parse` reads it back from anywhere."""
        return yaml.safe_dump(
            self.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True, width=110
        )

    def flatten(self) -> dict[str, JsonValue]:
        """Every setting under its dotted key: {"plan.budget": "3.0bpw", ...}."""
        return dict(_flatten(self.model_dump(mode="json", by_alias=True)))

    def replace(self, overrides: Mapping[str, JsonValue]) -> Self:
        """A copy with dotted keys set, checked like a recipe that was read."""
        lines = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
        return self.parse(self.to_yaml(), name="recipe", folder=Path(), overrides=lines)


_FIX = "fix the keys above in the recipe or in --set"
_STARTER = "the smallest recipe is one line: `model: path/to/checkpoint`; see recipes/quickstart.yaml"


def json_schema() -> dict[str, JsonValue]:
    """The JSON schema of a recipe, for editors."""
    return Recipe.model_json_schema(by_alias=True)


def known_keys() -> list[str]:
    """Every dotted key and section name of a recipe."""
    keys: list[str] = []
    for name, info in Recipe.model_fields.items():
        keys.append(info.alias or name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, _Section):
            keys += [f"{name}.{key}" for key in info.annotation.model_fields]
    return keys


def _apply_override(document: dict[str, object], override: str) -> str | None:
    """Sets one `key=value` in `document`; returns the problem, if there is one."""
    key, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        return f"--set {override}: expected key=value, such as --set plan.budget=2.5bpw"
    try:
        parsed = read_yaml(value, f"--set {key}")
    except RecipeError as error:
        return error.message
    *sections, leaf = key.split(".")
    here = document
    for section in sections:
        inner = here.get(section)
        if inner is not None and not isinstance(inner, dict):
            return f"--set {override}: {section} is {_kind(inner)}, not a section"
        here[section] = inner = dict(inner or {})
        here = inner
    here[leaf] = parsed
    return None


def _resolve_paths(document: Mapping[str, object], folder: Path) -> dict[str, object]:
    """A copy of a recipe in which relative paths start at `folder`; a model that is no folder there stays as it is."""

    def resolved(section: object, *keys: str) -> object:
        if not isinstance(section, dict):
            return section
        texts = {key: section[key] for key in keys if isinstance(section.get(key), str)}
        return section | {key: (folder / Path(text).expanduser()).resolve() for key, text in texts.items()}

    result = dict(document)
    model = result.get("model")
    if isinstance(model, str) and (model.startswith((".", "~")) or (folder / model).exists()):
        result["model"] = str((folder / Path(model).expanduser()).resolve())
    if "data" in result:
        result["data"] = resolved(result["data"], "calibration", "test")
    if "plan" in result:
        result["plan"] = resolved(result["plan"], "latencies")
    if "evaluate" in result:
        result["evaluate"] = resolved(result["evaluate"], "include", "task_data")
    for name, key in (("behaviors", "file"), ("features", "sae")):
        if isinstance(entries := result.get(name), list):
            result[name] = [resolved(entry, key) for entry in entries]
    return result


def _explain(entry: Mapping[str, object]) -> str:
    """One line for one pydantic error: dotted key, value, cause."""
    location = entry["loc"]
    parts = [str(part) for part in location] if isinstance(location, tuple) else []
    key, value = ".".join(parts), entry["input"]
    if entry["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, known_keys(), n=1)
        return f"{key}: unknown key" + (f"; did you mean {nearest[0]}?" if nearest else "")
    if entry["type"] == "missing":
        return f"{key}: required"
    message = str(entry["msg"]).removeprefix("Value error, ")
    if not parts:  # about several keys, which it names
        return message
    found = "" if message.startswith("no such") else f" (found {_kind(value)})"
    return f"{key}: {message[:1].lower()}{message[1:]}{found}"


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return "a mapping"
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _flatten(document: Mapping[str, JsonValue], prefix: str = "") -> Iterator[tuple[str, JsonValue]]:
    for key, value in document.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def describe_changes(
    old: Mapping[str, JsonValue], new: Mapping[str, JsonValue], *, ignore: Iterable[str] = ()
) -> list[str]:
    """One line for every dotted key whose value differs: `plan.budget: '3.0bpw' -> '2.5bpw'`."""
    keys = [key for key in (*old, *(key for key in new if key not in old)) if key not in set(ignore)]
    return [f"{key}: {_kind(old.get(key))} -> {_kind(new.get(key))}" for key in keys if old.get(key) != new.get(key)]
