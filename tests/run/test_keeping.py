"""Behaviors that a run keeps: leaned to, capped in the plan, judged on other prompts than it was planned on."""

import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

from circuitpress.apply import apply
from circuitpress.behaviors import load_behaviors
from circuitpress.console import Console
from circuitpress.errors import CircuitpressError, QualityGateMissed, RecipeError
from circuitpress.recipe import Recipe
from circuitpress.run import check_gates, keeping, refining, replan, run_recipe
from circuitpress.run.folder import open_folder
from circuitpress.run.keeping import _table, level, load_kept
from circuitpress.run.leaning import Measured
from circuitpress.run.session import Session
from circuitpress.run.watching import Watch
from circuitpress.score.ability import behavior_values
from circuitpress.stream import open_stream
from circuitpress.units import OUTER, Decision, Plan

from .likes import write_likes

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module")
def file(tiny_llama: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of which the tiny model prefers the good one."""
    path = tmp_path_factory.mktemp("behaviors") / "likes.jsonl"
    write_likes(path, tiny_llama, text, words=("door", "gladly"), pairs=40, length=6)
    return path


def recipe_of(make_recipe: MakeRecipe, model: Path, text: Path, file: Path, **changes: object) -> Recipe:
    entry = {"name": "likes", "file": str(file), "keep": 0.99, "of": "margin", "weight": 1.0} | changes
    extra = {"behaviors": [entry], "plan.budget": "3.5bpw", "plan.swaps": 0, "score.exact": 0.0, "plan.probes": []}
    extra |= {"plan.formats": ["int2", "int3", "int4", "int5", "int6", "int8"]}
    return make_recipe(model, text, **extra)


@pytest.fixture(scope="module")
def kept(
    make_recipe: MakeRecipe, tiny_llama: Path, text_file: Path, file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, Path]:
    recipe = recipe_of(make_recipe, tiny_llama, text_file, file)
    out = tmp_path_factory.mktemp("kept") / "run"
    run_recipe(recipe, out, Console(err=io.StringIO(), out=io.StringIO()))
    return recipe, out


def test_halves_are_disjoint_and_cover_everything(kept: tuple[Recipe, Path], console: Console) -> None:
    recipe, out = kept
    with open_folder(out, create=False) as folder:
        (entry,) = load_kept(Session(folder, recipe, console))
    rows = [{tuple(row) for row in half.pairs.good.tolist()} for half in (entry.watched, entry.judged)]  # pyright: ignore
    assert [len(half) for half in rows] == [20, 20]
    assert not rows[0] & rows[1]


def test_rounding_leans_until_the_plan_keeps_what_it_lost(kept: tuple[Recipe, Path]) -> None:
    """Within the same bytes: on the watched pairs by measurement, on the others against a model without the lean."""
    _, out = kept
    document = json.loads((out / "behaviors.json").read_text())
    first, *later = (entry for entry in document["rounds"] if "nats" in entry)
    assert first["nats"] == [0.0]
    assert first["margins"][0] < 0.99 * document["dense"][0]
    assert later
    assert document["leans"]["likes"] > 0
    assert document["missed"] == []
    assert document["caps"] == {}
    assert document["kl"] == [
        first["kl"],
        next(entry["kl"] for entry in later if entry["nats"] == [document["leans"]["likes"]]),
    ]
    plan = Plan.load(out / "plan.json")
    assert plan.bits_per_weight <= 3.5
    (row,) = json.loads((out / "evaluate" / "behaviors.json").read_text())
    assert row["kept"]


def test_the_model_is_the_one_that_leans(kept: tuple[Recipe, Path], tmp_path: Path, console: Console) -> None:
    """The same plan without the lean is another model, and a worse one on pairs that nothing was fitted to."""
    recipe, out = kept
    with open_folder(out, create=False) as folder:
        session = Session(folder, recipe, console)
        ids, plan = session.windows[0].ids, Plan.load(out / "plan.json")
        for name, leans in (("same", keeping.leans(session)), ("upright", [])):
            apply(
                session.stream, plan, ids, saliency=out / "pricing", shards=tmp_path / "shards", out=tmp_path / name,
                leans=leans,
            )  # fmt: skip
        (entry,) = session.kept
        margins = [level(open_stream(path), entry.judged).margin for path in (tmp_path / "same", tmp_path / "upright")]
    written, same, upright = (
        [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]
        for folder in (out / "model", tmp_path / "same", tmp_path / "upright")
    )
    assert written == same != upright
    assert margins[0] > margins[1]


def test_caps_spend_less_where_rounding_cannot_lean(
    kept: tuple[Recipe, Path], tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = kept
    copy = Path(shutil.copytree(out, tmp_path / "run"))
    (copy / "behaviors.json").unlink()
    monkeypatch.setattr(Watch, "may_lean", property(lambda _: False))
    with open_folder(copy, create=False) as folder:
        session = Session(folder, recipe, console)
        keeping.keep(session)
        table, formats = _table(session, session.kept[0]), session.prices.formats
    before = (copy / "plan.json").read_bytes()
    with open_folder(copy, create=False) as folder:  # killed behind the last write: the capped plan is not searched
        keeping.keep(Session(folder, recipe, console))
    assert (copy / "plan.json").read_bytes() == before != (out / "plan.json").read_bytes()
    document = json.loads((copy / "behaviors.json").read_text())
    first, *later = (entry for entry in document["rounds"] if "caps" in entry)
    assert first["caps"] == {}
    assert first["missed"] == ["likes"]
    assert later
    assert document["leans"] == {"likes": 0.0}
    assert document["caps"]["likes"] > 0
    plan = Plan.load(copy / "plan.json")
    assert plan.bits_per_weight <= 3.5
    assert any(text.startswith("likes: behavior likes loses at most") for text in plan.provenance["constraints"])
    offered = [f for f in formats if f in plan.provenance["formats"]]
    spent = sum(table[i, offered.index(d.format)] for i, d in enumerate(plan.decisions))
    assert spent <= document["caps"]["likes"] * (1 + 1e-9)
    unprotected = later[0]["caps"]["likes"] * 2
    assert spent <= 0.5 * unprotected * (1 + 1e-9)
    measured = [entry["measured"]["likes"]["margin"] for entry in (first, *later)]
    assert max(measured[1:]) > measured[0]


def test_the_judge_is_the_model_that_was_written(kept: tuple[Recipe, Path], tiny_llama: Path, file: Path) -> None:
    """Against the packed model and the original, on the half that nothing was fitted to."""
    _, out = kept
    (row,) = json.loads((out / "evaluate" / "behaviors.json").read_text())
    (behavior,) = load_behaviors(file, AutoTokenizer.from_pretrained(tiny_llama))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    judged = behavior.take(order[20:])
    for folder, prefix in ((out / "model", ""), (tiny_llama, "reference_")):
        _, margins = behavior_values(open_stream(folder), judged)
        assert row[f"{prefix}margin"] == pytest.approx(margins.mean(), rel=1e-6)
        assert row[f"{prefix}accuracy"] == (margins > 0).mean()
    assert row["kept"] == (row["margin"] >= 0.99 * row["reference_margin"])


def test_gates_name_the_behavior_and_what_it_takes() -> None:
    row = {"name": "likes", "of": "accuracy", "keep": 0.9, "reference_accuracy": 1.0, "accuracy": 0.7, "kept": False}
    fidelity = {"kl": 0.1, "top1_agreement": 0.9, "behaviors": [row], "behaviors_take": "3.30bpw"}
    recipe = Recipe.parse("{}", name="r", folder=Path(), overrides=["model=gpt2"])
    with pytest.raises(QualityGateMissed, match=r"likes: accuracy is 0.7, of 1 keep is 0.9; plans kept .* at 3.30bpw"):
        check_gates(recipe, fidelity)
    check_gates(recipe, fidelity | {"behaviors": [row | {"kept": True}]})


def test_a_floor_out_of_reach_says_what_it_would_take(
    kept: tuple[Recipe, Path], tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Larger budgets are measured in turn; here everything from 3.9 bits on keeps the behavior."""
    recipe, out = kept
    copy = Path(shutil.copytree(out, tmp_path / "run"))
    (copy / "behaviors.json").unlink()

    def measure(self: Watch, decisions: Sequence[Decision], nats: NDArray[np.float64]) -> Measured:
        del nats
        inside = sum(d.nbytes for d in decisions if d.group.layer != OUTER)
        reached = 8 * inside / self._session.prices.linear_numel >= 3.9
        return Measured(np.array([20.0 if reached else 1.0]), np.ones(1), np.zeros(1), 0.1)

    monkeypatch.setattr(Watch, "may_lean", property(lambda _: False))
    monkeypatch.setattr(Watch, "measure", measure)
    with open_folder(copy, create=False) as folder:
        keeping.keep(Session(folder, recipe, console))
    document = json.loads((copy / "behaviors.json").read_text())
    assert document["missed"] == ["likes"]
    assert document["takes"] == "4.38bpw"


def test_of_plans_that_all_miss_the_nearest_is_taken(
    kept: tuple[Recipe, Path], tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan without caps comes first; the second one is better and still not enough."""
    recipe, out = kept
    copy = Path(shutil.copytree(out, tmp_path / "run"))
    (copy / "behaviors.json").unlink()
    margins = iter([3.0, 5.0, 4.0])

    def measure(self: Watch, decisions: Sequence[Decision], nats: NDArray[np.float64]) -> Measured:
        del self, decisions, nats
        return Measured(np.array([next(margins, 1.0)]), np.ones(1), np.zeros(1), 0.1)

    monkeypatch.setattr(Watch, "may_lean", property(lambda _: False))
    monkeypatch.setattr(Watch, "measure", measure)
    with open_folder(copy, create=False) as folder:
        keeping.keep(Session(folder, recipe, console))
    document = json.loads((copy / "behaviors.json").read_text())
    assert document["missed"] == ["likes"]
    rounds = [entry for entry in document["rounds"] if "caps" in entry]
    assert len(rounds) >= 2
    assert document["caps"] == rounds[1]["caps"] != {}


def test_another_budget_throws_away_what_was_kept_for_this_one(
    kept: tuple[Recipe, Path], tmp_path: Path, console: Console
) -> None:
    copy = Path(shutil.copytree(kept[1], tmp_path / "run"))
    replan(copy, console, budget="4bpw", target=None, protect=(), front=False)
    assert not (copy / "behaviors.json").exists()
    assert not (copy / "model").exists()


def test_what_the_original_cannot_do_is_refused(
    make_recipe: MakeRecipe, tiny_llama: Path, text_file: Path, file: Path, tmp_path: Path, console: Console
) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    turned = tmp_path / "dislikes.jsonl"
    turned.write_text("\n".join(json.dumps({"good": row["bad"], "bad": row["good"]}) for row in rows))
    recipe = recipe_of(make_recipe, tiny_llama, text_file, turned, name="dislikes")
    with pytest.raises(CircuitpressError, match="dislikes: the original decides 0% of 20 pairs right, no better"):
        run_recipe(recipe, tmp_path / "run", console)


def test_a_name_that_the_file_does_not_hold(
    make_recipe: MakeRecipe, tiny_llama: Path, text_file: Path, file: Path, tmp_path: Path, console: Console
) -> None:
    recipe = recipe_of(make_recipe, tiny_llama, text_file, file, name="loves")
    with pytest.raises(RecipeError, match="has no 'loves'; it has likes"):
        run_recipe(recipe, tmp_path / "run", console)


def test_refinement_holds_on_to_what_rounding_leaned_to(
    kept: tuple[Recipe, Path], tmp_path: Path, console: Console
) -> None:
    """The margins of the leaned model, at ten times the nats that rounding paid; nothing where it did not lean."""
    recipe, out = kept
    copy = Path(shutil.copytree(out, tmp_path / "run"))
    with open_folder(copy, create=False) as folder:
        session = Session(folder, recipe, console)
        (hold,) = refining._holds(session)
        (entry,) = session.kept
        document = json.loads((copy / "behaviors.json").read_text())
        assert hold.rate == pytest.approx(10 * document["leans"]["likes"])
        assert hold.aim == pytest.approx(level(open_stream(copy / "model"), entry.watched).margin)
        np.testing.assert_allclose(hold.dense, behavior_values(session.original, entry.watched)[1], rtol=1e-6)
        (copy / "behaviors.json").write_text(json.dumps(document | {"leans": {"likes": 0.0}}))
        assert refining._holds(session) == []
