"""What a contrast says of a difference, its interval and its p-value."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from instruct_lm.evaluation.statistics import Difference
from instruct_lm.report import comparison
from instruct_lm.report.comparison import Contrast, count_text, p_text
from instruct_lm.report.evaluations import Evaluation
from instruct_lm.report.settings import Setting, differing, group
from instruct_lm.report.tables import agreement_table, scores_table


def contrast(mean: float, low: float, high: float, p_value: float, judge: str = "a", **found: Any) -> Contrast:
    settings = [
        SimpleNamespace(name=name, runs=[SimpleNamespace(summary={"judge": kind})])
        for name, kind in (("tuned", "a"), ("untuned", judge))
    ]
    values = {"spread": 10.0, "entries": 110, **found}
    return Contrast(*settings, {"score": Difference(mean, low, high, p_value, **values)}, p_value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mean", "low", "high", "p_value", "significant"),
    [
        (2.0, 1.0, 3.0, 0.01, True),
        (-2.0, -3.0, -1.0, 0.01, True),
        (2.0, -0.1, 4.1, 0.01, False),  # the interval holds 0
        (2.0, 0.0, 4.0, 0.01, False),
        (-2.0, -4.0, 0.0, 0.01, False),
        (2.0, 1.0, 3.0, 0.05, False),  # not below the level
        (2.0, 1.0, 3.0, 0.0499, True),
    ],
)
def test_a_difference_is_significant_by_its_p_value_and_its_interval(
    mean: float, low: float, high: float, p_value: float, significant: bool
) -> None:
    found = contrast(mean, low, high, p_value)
    assert found.significant == significant
    assert ("no difference that 110 entries can show" in found.sentence) != significant
    assert f" is {'better' if mean > 0 else 'worse'} than " in found.sentence or not significant


def test_a_sentence_names_what_would_show_the_difference() -> None:
    # (2.801585 * 10 / 2)^2 = 196.2, and with a tenth of the spread 1.96, at least 2
    assert contrast(2, -1, 5, 0.2).sentence.endswith("To show it, about 200 entries would be needed.")
    assert count_text(contrast(2, -1, 5, 0.2).found.entries_needed or 0) == "200"  # 197
    assert [count_text(count) for count in (7, 1137, 205_673)] == ["7", "1,100", "210,000"]
    assert contrast(2, -1, 5, 0.2, entries=197).sentence.endswith("To show it, more seeds would be needed.")
    assert contrast(2, -1, 5, 0.2, entries=196).sentence.endswith("about 200 entries would be needed.")
    assert "needed" not in contrast(0.0, -1, 1, 1.0).sentence


def test_a_sentence_counts_seeds_and_says_where_judges_differ() -> None:
    assert (
        "that 110 entries and 3 seeds can show: +2.0 ± 3.0, p = 0.20." in contrast(2, -1, 5, 0.2, seeds=(1, 3)).sentence
    )
    assert "seeds can" not in contrast(2, -1, 5, 0.2, seeds=(1, 1)).sentence
    for p_value in (0.001, 0.2):
        assert "judges differ" in contrast(2, 1, 3, p_value, judge="b").sentence
        assert "judges differ" not in contrast(2, 1, 3, p_value).sentence


@pytest.mark.parametrize(("seeds", "same"), [((1, 2), True), ((1, 3), False), ((1, 2, 3), False)])
def test_runs_are_paired_by_seed_only_where_both_sides_have_the_same(
    seeds: tuple[int, ...], same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []
    monkeypatch.setattr(comparison, "paired_difference", lambda first, second, same_seeds: told.append(same_seeds))
    runs = [SimpleNamespace(examples=[], summary={"judge": "a"})]
    tuned, base = (
        SimpleNamespace(runs=runs, seeds=each, values=lambda metric, places: np.ones((2, 4)))
        for each in ((1, 2), seeds)
    )
    comparison._differences(tuned, base)  # type: ignore[arg-type]
    assert set(told) == {same}


def test_a_mean_is_over_the_entries_that_every_seed_has_a_score_of() -> None:
    runs = [SimpleNamespace(values={"score": np.array(scores)}) for scores in ([1, np.nan, 3, 9], [2, 5, 6, np.nan])]
    found = Setting("both", tuple(runs))  # type: ignore[arg-type]
    mean = found.mean("score")
    assert mean is not None
    assert mean[0] == (1 + 3 + 2 + 6) / 4
    assert mean[1] <= mean[0] <= mean[2]
    assert found.mean("score", [1, 3]) is None


def test_entries_without_a_score_are_those_of_all_seeds() -> None:
    runs = [SimpleNamespace(examples=["an entry"], summary={"failed": failed}) for failed in (1, 2)]
    setting = SimpleNamespace(name="both", runs=runs, seeds=(1, 2), mean=lambda metric: None)
    (row,) = scores_table(SimpleNamespace(settings=[setting], runs=runs, headline="chrf")).rows  # type: ignore[arg-type]
    assert (row["without a score"], row["seeds"]) == ("3", "1, 2")


@pytest.mark.parametrize(("answers", "rows"), [(["a", "b"], 1), (["a", "c"], 0)])
def test_judges_are_compared_on_the_same_answers_alone(answers: list[str], rows: int) -> None:
    scores = {"score": np.array([10.0, 20.0])}
    runs = [
        SimpleNamespace(name=judge, examples=[1, 2], answers=given, summary={"judge": judge}, values=scores)
        for judge, given in (("first", ["a", "b"]), ("second", answers))
    ]
    assert len(agreement_table(SimpleNamespace(runs=runs)).rows) == rows  # type: ignore[arg-type]


@pytest.mark.parametrize(("seeds", "groups"), [((1, 2), [2]), ((1, 1), [1, 1])])
def test_the_same_seed_twice_is_no_group_of_seeds(seeds: tuple[int, int], groups: list[int]) -> None:
    runs = [Evaluation("a", False, None, {}, [], [], {}, {}, settings={"seed": seed}, training={}) for seed in seeds]
    assert [len(setting.runs) for setting in group(runs)] == groups


def test_entries_that_are_kept_out_of_training_have_not_been_seen() -> None:
    unknown = Evaluation("a", True, None, {}, [], [], {}, config={}, settings={}, training={})
    assert unknown.seen is None
    assert replace(unknown, config={"data": {"deduplicate": 0.9}}).seen == []


def test_a_model_without_a_checkpoint_does_not_differ_by_it() -> None:
    best, last, untuned = (SimpleNamespace(settings={"seed": 1, "checkpoint": x}) for x in ("best", "last", None))
    assert differing([best, untuned]) == []  # type: ignore[list-item]
    assert differing([best, last, untuned]) == ["checkpoint"]  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("p_value", "text"),
    [(0.0009, "p < 0.001"), (0.001, "p = 0.001"), (0.0014, "p = 0.001"), (0.0994, "p = 0.099"), (0.1, "p = 0.10")],
)
def test_p_values_have_three_digits_below_a_tenth(p_value: float, text: str) -> None:
    assert p_text(p_value) == text
