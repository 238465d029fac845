"""What the keep stage measures against models that are written to disk with the same lean."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from circuitpress.apply import apply
from circuitpress.console import Console
from circuitpress.evaluate import fidelity
from circuitpress.lean import Lean
from circuitpress.margins import half_of
from circuitpress.recipe import Recipe
from circuitpress.run import run_recipe
from circuitpress.run.folder import open_folder
from circuitpress.run.session import Session
from circuitpress.run.watching import TOKENS, Watch, leans_of
from circuitpress.score.ability import behavior_values
from circuitpress.score.metrics import as_decision
from circuitpress.stream import open_stream
from circuitpress.units import Plan

from .likes import write_likes

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "corrected"])
def run(
    make_recipe: MakeRecipe, tiny_llama: Path, text: str, text_file: Path, tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> tuple[Recipe, Path]:  # fmt: skip
    """A run that keeps two behaviors of different lengths, at floors that every plan meets."""
    work = tmp_path_factory.mktemp("watched")
    entries = []
    for name, length, words in (("short", 4, ("river", "night")), ("long", 9, ("door", "gladly"))):
        path = work / f"{name}.jsonl"
        write_likes(path, tiny_llama, text, words=words, pairs=22, length=length)
        entries.append({"name": name, "file": str(path), "keep": 1e-6, "of": "margin", "weight": 0.0})
    extra = {"behaviors": entries, "plan.budget": "4bpw", "plan.swaps": 0, "score.exact": 0.0, "plan.probes": []}
    recipe = make_recipe(tiny_llama, text_file, **extra | {"quantize.correct": request.param})
    run_recipe(recipe, work / "run", Console(err=io.StringIO(), out=io.StringIO()))
    return recipe, work / "run"


def test_margins_and_text_are_those_of_written_models(
    run: tuple[Recipe, Path], console: Console, tmp_path: Path
) -> None:
    """One model leans to each half of the watched pairs; every pair is judged by the one that leans to the other."""
    recipe, out = run
    plan = Plan.load(out / "plan.json")
    with open_folder(out, create=False) as folder:
        session = Session(folder, recipe, console)
        watch = Watch(session)
        gains = watch.respond()
        nats = 2.0 / np.diag(np.abs(gains))
        upright, found = (watch.measure([*plan.decisions, *plan.outer], share * nats) for share in (0.0, 1.0))
        models = []
        for half in (0, 1):
            leans = leans_of(out, session.kept, nats, (half,))
            assert [(lean.nats, lean.halves) for lean in leans] == [(float(share), (half,)) for share in nats]
            model = tmp_path / f"leans-{half}"
            apply(
                session.stream, plan, session.windows[0].ids, saliency=out / "pricing", shards=tmp_path / "shards",
                out=model, correct=recipe.quantize.correct, leans=leans,
            )  # fmt: skip
            models.append(open_stream(model))
        text = session.windows[1].ids[: TOKENS // session.windows[1].ids.shape[1]]
        for k, kept in enumerate(session.kept):
            first, second = (behavior_values(model, kept.watched)[1] for model in models)
            halves = half_of(as_decision(kept.watched))[: len(kept.watched)].numpy()
            expected = np.where(halves == 1, first, second)
            assert found.margins[k] == pytest.approx(expected.mean(), rel=1e-5)
            assert found.accuracies[k] == (expected > 0).mean()
            spread = (expected - watch.margins[k]).std(ddof=1) / len(expected) ** 0.5
            assert found.stderr[k] == pytest.approx(spread, rel=1e-4)
            written = behavior_values(open_stream(out / "model"), kept.watched)[1]
            assert upright.margins[k] == pytest.approx(written.mean(), rel=1e-5)
        kl = np.mean([fidelity(model, session.original, text).divergence.kl for model in models])
        assert found.kl == pytest.approx(kl, rel=1e-4)
        assert upright.kl == pytest.approx(fidelity(open_stream(out / "model"), session.original, text).divergence.kl)
        # A lean that is wanted on paper is one on other pairs, too.
        assert (found.margins > upright.margins).all()


def test_shares_of_nothing_pull_nothing(run: tuple[Recipe, Path], console: Console) -> None:
    recipe, out = run
    with open_folder(out, create=False) as folder:
        kept = Session(folder, recipe, console).kept
    assert leans_of(out, kept, [0.0, 3.0]) == [Lean(out / "pricing-behaviors" / "long" / "gradients", 3.0)]
