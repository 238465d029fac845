"""What `audit` asks of both models alike: behaviors, the safety set of chat models, circuits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import Console
from ..errors import CircuitpressError, RecipeError
from .opening import Opened

if TYPE_CHECKING:
    import circuitpress.behaviors

Behaviors = Mapping[str, "circuitpress.behaviors.Behavior"]
Rows = list[dict[str, Any]]


def read_behaviors(
    opened: Opened, file: Path | None, unfit: dict[str, str], *, safety: bool
) -> tuple[Behaviors, set[str]]:
    """The behaviors to measure by name, those of the file first, and the names of the safety set among them.

    The set is added for models with a chat template; a behavior of the file takes the place of one with its name.
    """
    from ..behaviors import load_behaviors, safety_set

    found = {b.name: b for b in (load_behaviors(file, opened.tokenizer, unfit=unfit) if file else [])}
    added = {b.name: b for b in (safety_set(opened.tokenizer, unfit=unfit) if safety else []) if b.name not in found}
    return found | added, set(added)


def ask_behaviors(before: Opened, after: Opened, behaviors: Behaviors, safety: set[str], console: Console) -> Rows:
    """The accuracy and the margin of every behavior in both models."""
    from ..score.ability import ability

    found = []
    with console.progress("behaviors", len(behaviors)) as advance:
        for name, behavior in behaviors.items():
            was, is_now = (ability(opened.stream, behavior) for opened in (before, after))
            row = {"name": name, "metric": behavior.metric, "pairs": was.pairs, "evidence": "causal"}
            row |= {"safety": name in safety, "able": was.is_able}
            row |= {"reference_accuracy": was.accuracy, "accuracy": is_now.accuracy}
            row |= {"reference_mean": was.mean, "mean": is_now.mean}
            # Decisions of the same pairs: the error of a difference of shares, at most.
            spread = [p * (1 - p) / was.pairs for p in (was.accuracy, is_now.accuracy)]
            found.append(row | {"stderr": math.sqrt(sum(spread)), "lost": was.is_able and not is_now.is_able})
            advance(1, name)
    return found


def ask_circuits(before: Opened, after: Opened, files: Sequence[Path], behaviors: Behaviors, console: Console) -> Rows:
    """Faithfulness and completeness of saved circuits in both models, each on its behavior's prompts.

    A circuit that cannot be measured in the model has the reason in place of numbers, and counts as lost; one that
    cannot be measured in the reference is an error. RecipeError where the behavior of a circuit was not given.
    """
    from ..mech.circuits import Circuit, stand

    circuits = {file: Circuit.load(file) for file in files}
    names = {file: str(circuit.provenance.get("behavior")) for file, circuit in circuits.items()}
    if problems := [f"{file}: its behavior is {name!r}" for file, name in names.items() if name not in behaviors]:
        raise RecipeError(problems, hint="add --behaviors with the file that holds its prompts, under that name")
    found: Rows = []
    with console.progress("circuits", len(files)) as advance:
        for file, circuit in circuits.items():
            behavior = behaviors[names[file]]
            row: dict[str, Any] = {"circuit": str(file), "behavior": behavior.name, "size": circuit.size}
            row |= {"granularity": circuit.granularity, "protect": list(circuit.patterns), "ablation": "resample"}
            was = stand(before.stream, behavior, circuit)
            try:
                is_now = stand(after.stream, behavior, circuit)
            except CircuitpressError as error:
                row |= {"model": {"reason": error.message}, "lost": True}
            else:
                row |= {"model": asdict(is_now), "lost": is_now.faithfulness.high < was.faithfulness.low}
            found.append(row | {"reference": asdict(was), "pairs": len(behavior), "evidence": "causal"})
            advance(1, behavior.name)
    return found
