"""What the first screen of a report says: title, facts, the answer, warnings; and the names of the settings."""

import html
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instruct_lm.commands import report
from instruct_lm.io.records import read_record, write_record
from instruct_lm.report import findings
from instruct_lm.report.comparison import Comparison, compare
from instruct_lm.report.evaluations import collect
from instruct_lm.report.page import render
from instruct_lm.report.settings import value_text
from instruct_lm.report.side_by_side import by_disagreement, side_by_side

from .run_folders import config_of, write_evaluation, write_run

N = 40
BASE = np.linspace(20, 80, N)
NOISE = np.tile([-6.0, 6.0], N // 2)


def sweep(folder: Path, shifts: dict[float, float], seeds: tuple[int, ...] = (1,), **more: Any) -> Comparison:
    """An untuned model and runs of these prompt weights, whose scores are 10 points higher and then shifted."""
    answers = ["an answer"] * N
    write_evaluation(folder / "untuned", answers, BASE.tolist(), config={"model": {"name": "gpt2-tiny"}})
    for weight, shift in shifts.items():
        for seed in seeds:
            scores = (BASE + 10 + shift + (NOISE if shift else 0)).tolist()
            write_run(folder / "sweep" / f"{weight}-{seed}", answers, scores, config=config_of(seed, weight, **more))
    return compare(collect([f"untuned={folder / 'untuned'}", str(folder / "sweep")])[0])


def test_one_sentence_answers_the_question_and_one_tells_of_the_untuned_model(tmp_path: Path) -> None:
    comparison = sweep(tmp_path, {0: 0, 0.1: 0.5, 1: -0.5}, (1, 2))
    answer, untuned = findings.sentences(comparison)
    lower, higher = (contrast.size for contrast in comparison.question[::-1])
    least = min(contrast.p_value for contrast in comparison.question)
    assert answer == (
        "No difference between prompt weight=0 and 2 other settings that 40 entries and 2 seeds can show: "
        f"{lower} (prompt weight=1) to {higher} (prompt weight=0.1), smallest p = {least:.2f} (Holm, 2 comparisons)."
    )
    assert (lower[:4], higher[:4], least > 0.1) == ("−0.5", "+0.5", True)
    assert untuned == "All 3 settings are better than untuned, by 9.5 to 10.5, each p < 0.001 (Holm, 3 comparisons)."


def test_settings_that_differ_are_named_and_the_others_counted(tmp_path: Path) -> None:
    answer, untuned = findings.sentences(sweep(tmp_path, {0: 0, 0.1: 0.5, 0.3: -30, 1: 20}))
    assert answer.startswith("2 of 3 settings differ from prompt weight=0 (Holm, 3 comparisons): prompt weight=0.3 is ")
    assert re.search(
        r"prompt weight=0\.3 is worse by 30\.0 ± \d\.\d, p < 0\.001; prompt weight=1 is better by 20", answer
    )
    assert re.search(
        r"For prompt weight=0\.1, no difference that 40 entries can show: \+0\.5 ± \d\.\d, p = [01]\.\d\d\.$", answer
    )
    assert untuned.startswith("4 of 4 settings differ from untuned")  # one is worse
    one, _ = findings.sentences(sweep(tmp_path / "one", {0.1: 0, 0.3: -30, 1: 0}))
    assert re.fullmatch(
        r"prompt weight=0\.3 is worse than prompt weight=0\.1 by 30\.0 ± \d\.\d, p < 0\.001 \(Holm, 2 comparisons\)\. "
        r"For prompt weight=1, no difference that 40 entries can show: 0\.0 ± 0\.0, p = 1\.00\.",
        one,
    )


def test_two_trained_settings_and_a_single_evaluation_have_their_sentences(tmp_path: Path) -> None:
    answer, untuned = findings.sentences(sweep(tmp_path, {0: 0, 1: 9}))
    assert answer.startswith("prompt weight=1 is better than prompt weight=0 by 9.0 ± ")
    assert untuned.startswith("All 2 settings are better than untuned")
    assert findings.sentences(compare(collect([str(tmp_path / "untuned")])[0])) == []


def test_title_and_facts_say_what_was_evaluated(tmp_path: Path) -> None:
    comparison = sweep(tmp_path, {0: 0, 0.1: 1, 1: 2}, (1, 2))
    assert findings.title(comparison) == "gpt2-tiny on sample: 3 settings of prompt weight"
    facts = findings.facts(comparison)
    assert facts.pop("Scored") == "2026-01-31"
    assert facts == {
        "Model": "gpt2-tiny",
        "Data": "sample",
        "Entries": "40 (test)",
        "Judge": "reference (mean of exact match x 100 and sentence chrF)",
        "Seeds": "2 (1, 2)",
        "Precision": "32-true",
        "Evaluations": "7",
    }
    page = render(comparison, findings.title(comparison))
    first_screen = html.unescape(page[page.index("<h1>") : page.index('<nav aria-label="Sections">')])
    for text in (*facts.values(), findings.sentences(comparison)[1], "difference in score from prompt weight=0"):
        assert text in first_screen.replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("scores", "warning"),
    [
        ([0.0] * 36 + [50.0] * 4, "Floor effect"),
        ([100.0] * 36 + [50.0] * 4, "Ceiling effect"),
        ([0.0] * 35 + [50.0] * 5, ""),
        ([0.0] * 20 + [100.0] * 20, ""),
    ],
)
def test_scores_at_one_end_of_the_scale_are_a_warning(tmp_path: Path, scores: list[float], warning: str) -> None:
    for name in ("a", "b"):
        write_evaluation(tmp_path / name, ["x"] * N, scores)
    found = findings.warnings(compare(collect([str(tmp_path / "a"), str(tmp_path / "b")])[0]))
    assert [text.partition(":")[0] for text in found] == ([warning] if warning else [])


def test_different_precisions_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert findings.warnings(sweep(tmp_path, {0: 0, 1: 1})) == []
    for file in ("sweep/1-1/evaluation/test/summary.json", "sweep/1-1/summary.json"):
        write_record((read_record(tmp_path / file) or {}) | {"precision": "bf16-mixed"}, tmp_path / file)
    other = tmp_path / "sweep/0-1/summary.json"
    write_record((read_record(other) or {}) | {"precision": "32-true"}, other)
    arguments = [f"untuned={tmp_path / 'untuned'}", str(tmp_path / "sweep")]
    answered, trained = findings.warnings(compare(collect(arguments)[0]))
    assert "answered in different precisions" in answered
    assert "(untuned, prompt weight=0: 32-true; prompt weight=1: bf16-mixed)" in answered
    assert "trained in different precisions" in trained
    assert report.main(arguments) == 0
    assert "Warning: The settings were answered in different precisions" in capsys.readouterr().out


def test_settings_that_differ_in_their_precision_alone_need_no_warning_of_it(tmp_path: Path) -> None:
    for precision in ("32-true", "bf16-mixed"):
        for seed in (1, 2):
            folder = tmp_path / f"{precision}-{seed}"
            write_run(folder, ["x"] * N, BASE.tolist(), config=config_of(seed, device={"precision": precision}))
            for file in ("evaluation/test/summary.json", "summary.json"):
                write_record((read_record(folder / file) or {}) | {"precision": precision}, folder / file)
    comparison = compare(collect([str(tmp_path)])[0])
    assert [setting.name for setting in comparison.settings] == ["precision=32-true", "precision=bf16-mixed"]
    assert findings.warnings(comparison) == []


def test_untuned_models_of_a_sweep_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    for style in ("alpaca", "chatml"):
        run = write_run(tmp_path / style, ["x"] * N, BASE.tolist(), config=config_of(prompt={"style": style}))
        folder = write_evaluation(
            run / "evaluation" / "test-untuned", ["y"] * N, BASE.tolist(), config={"prompt": {"style": style}}
        )
        (folder / ".hydra" / "evaluate").mkdir(parents=True)
        (folder / ".hydra" / "evaluate" / "config.yaml").write_text("checkpoint: untuned\n")
    loaded = collect([str(tmp_path / style / "evaluation" / "test-untuned") for style in ("alpaca", "chatml")])[0]
    names = [setting.name for setting in compare(loaded).settings]
    assert names == ["untuned, prompt=alpaca", "untuned, prompt=chatml"]
    assert [setting.name for setting in compare(loaded[:1]).settings] == ["untuned"]


def test_full_fine_tuning_and_lora_are_called_so_whatever_the_untuned_model_differs_in(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "untuned", ["x"] * N, BASE.tolist(), config={"generation": {"max_new_tokens": 9}})
    for rank, rate in ((0, 5e-5), (8, 2e-4)):
        config = config_of(lora={"rank": rank}, optimizer={"lr": rate})
        write_run(tmp_path / "sweep" / str(rank), ["x"] * N, BASE.tolist(), config=config)
    names = [s.name for s in compare(collect([str(tmp_path / "untuned"), str(tmp_path / "sweep")])[0]).settings]
    assert names == ["untuned", "full fine-tuning, lr=5e-5", "LoRA rank=8, lr=2e-4"]


@pytest.mark.parametrize(
    "folders", [["9_lr-1", "10_lr-1"], ["lr-5e-5", "lr-5e-4", "lr-0.01"], ["weight-0", "weight-0.01", "weight-0.1"]]
)
def test_runs_of_a_sweep_are_in_the_order_of_their_numbers(tmp_path: Path, folders: list[str]) -> None:
    for number, folder in enumerate(folders):
        write_run(tmp_path / folder, ["x"] * 3, [1.0] * 3, config=config_of(number))
    assert [run.settings["seed"] for run in collect([str(tmp_path)])[0]] == [0, 1, 2][: len(folders)]


def test_entries_are_in_the_order_of_disagreement_between_trained_settings(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "untuned", ["x"] * 3, [0.0, 50.0, 50.0])
    for weight, scores in ((0.0, ([90, 40, 50], [92, 60, 90])), (1.0, ([91, 50, 50], [91, 30, 30]))):
        for seed, of_seed in enumerate(scores):
            write_run(tmp_path / "sweep" / f"{weight}-{seed}", ["y"] * 3, of_seed, config=config_of(seed, weight))
    comparison = compare(collect([str(tmp_path / "untuned"), str(tmp_path / "sweep")])[0])
    entries = by_disagreement(side_by_side(comparison))
    # Means of the seeds: 91, 50, 70 and 91, 40, 40; the untuned model is furthest off in the first entry.
    assert [(entry.number, entry.spread) for entry in entries] == [(3, 30), (2, 10), (1, 0)]


def test_long_answers_are_clamped_and_short_ones_are_not(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", ["short", "long " * 100, "line\n" * 9], [1.0, 2.0, 3.0])
    page = render(compare(collect([str(tmp_path / "a")])[0]), "t")
    assert page.count('<div class="long">') == page.count('<label class="more">') == 2
    assert re.search(r'<div class="answer"[^>]*><h4>a[^\n]*</h4>\s*<p class="text" dir="auto">short</p>', page)
    assert "long " * 100 in page


@pytest.mark.parametrize("width", [80, 100])
def test_tables_fit_the_terminal_and_say_what_they_leave_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    sweep(tmp_path, {0: 0, 1: 1})
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert (
        report.main([f"untuned={tmp_path / 'untuned'}", str(tmp_path / "sweep"), "--md", str(tmp_path / "r.md")]) == 0
    )
    out = capsys.readouterr().out.partition("Written")[0]
    assert max(map(len, out.splitlines())) <= width
    assert "A wider terminal, --md and --html show: " in out
    assert "A wider terminal" not in (tmp_path / "r.md").read_text(encoding="utf-8")
    assert out.rindex("setting  ") < out.index("All 2 settings are better")  # the verdict comes last


@pytest.mark.parametrize(
    ("value", "text"),
    [(5e-5, "5e-5"), (-2.5e-4, "-2.5e-4"), (0.001, "0.001"), (0.25, "0.25"), (1e6, "1e6"), (0.0, "0"), (True, "true")],
)
def test_numbers_are_written_as_people_type_them(value: object, text: str) -> None:
    assert value_text(value) == text
