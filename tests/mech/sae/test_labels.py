"""Prompts for labels and the scoring of labels: marks, exams, balanced accuracy with ties, and the control."""

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import pytest
import torch

from circuitpress.mech.examples import Examples, Excerpt
from circuitpress.mech.sae.labels import balanced_accuracy, chance_error, detection, exam, explain, question


def word(token: int) -> str:
    return f" w{token}"


def test_a_prompt_marks_the_tokens_on_which_the_feature_is_active() -> None:
    row = Excerpt(0, 0, 2, 4.0, (5, 6, 7, 8, 9), (0.0, 2.5, 4.0, 1.9, 3.0))
    text = explain(Examples("3", (row, row), (row,), 0.1, 0.2), word)
    assert "1. w5<< w6 w7>> w8<< w9>> (4.00)" in text
    assert text.count("<< w6 w7>>") == 2  # the control is not shown
    assert text.endswith("Phrase:")


def test_an_exam_has_as_many_peaks_as_silences() -> None:
    ids = torch.arange(40 * 9).view(40, 9)
    values = torch.zeros(40, 9)
    for window in range(25):
        values[window, 1 + window % 8] = 1.0 + window
    found = exam(3, ids, values, word, count=6, before=2, after=1, skip=1)
    assert found is not None
    assert sum(found.fires) == 6 == len(found.texts) - sum(found.fires)
    assert found.fires != tuple(sorted(found.fires, reverse=True))
    seen = []
    for text, fires in zip(found.texts, found.fires, strict=True):
        tokens = [int(part[1:]) for part in text.split()]
        window = tokens[0] // 9
        assert len(tokens) <= 4
        assert len({token // 9 for token in tokens}) == 1
        assert fires == (window < 25) == (values.flatten()[tokens].max() > 0)
        seen += [window] * fires
    assert max(seen) == 24
    assert min(seen) < 6  # from the highest peak to low ones
    assert exam(3, ids, values, word, count=6, before=2, after=1, skip=1) == found
    assert exam(3, ids, values + 1, word) is None
    assert exam(3, ids, values * 0, word) is None


@pytest.mark.parametrize("seed", range(6))
def test_balanced_accuracy_averages_over_orders_of_equal_scores(seed: int) -> None:
    rng = np.random.default_rng(seed)
    fires = rng.permutation([True] * 3 + [False] * 3).tolist()
    scores = rng.integers(0, 3, 6).tolist()
    shares = []
    for order in permutations(range(6)):
        ranked = sorted(order, key=lambda i: -scores[i])  # stable: keeps the order of equal scores
        chosen = ranked[:3]
        right = sum(fires[i] for i in chosen) + sum(not fires[i] for i in ranked[3:])
        shares.append(right / 6)
    assert balanced_accuracy([float(score) for score in scores], fires) == pytest.approx(np.mean(shares))


def test_the_error_of_chance_is_that_of_random_scores() -> None:
    rng = np.random.default_rng(0)
    drawn = [balanced_accuracy(rng.random(10).tolist(), [True, False] * 5) for _ in range(4000)]
    assert np.mean(drawn) == pytest.approx(0.5, abs=0.01)
    assert np.std(drawn) == pytest.approx(chance_error(10), rel=0.05)


def test_a_good_label_is_told_from_another_features() -> None:
    """Feature f fires on token 100 + f; the judge looks for the label in the text, and always leans to yes."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(90, (60, 8), generator=generator)
    exams = []
    for feature in range(4):
        own = ids.clone()
        own[:30, 4] = 100 + feature
        found = exam(feature, own, (own == 100 + feature).float(), word, count=8)
        assert found is not None
        exams.append(found)

    def judge(prompts: Sequence[str]) -> list[float]:
        result = []
        for prompt in prompts:
            label, text = (line.partition(": ")[2] for line in prompt.splitlines() if line.startswith(("La", "Te")))
            result.append(7.0 + (label in text.split()))
        return result

    names = [f"w{100 + feature}" for feature in range(3)]
    rows = detection(exams, [*names, "w1000"], judge)
    assert [row.accuracy for row in rows] == [1, 1, 1, 0.5]
    assert all(row.control == 0.5 and row.other_label != row.label for row in rows)
    assert {row.status for row in rows} == {"unproven"}
    assert rows[0].texts == 16
    with pytest.raises(ValueError, match="two different labels"):
        detection(exams[:2], ["same", "same"], judge)


def test_a_question_is_on_single_lines() -> None:
    assert "Label: a b\nText: c d\n" in question("a\nb", "c\n\nd")
