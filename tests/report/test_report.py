import json
import os
import re
import shutil
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from instruct_lm.commands import report
from instruct_lm.errors import InputError
from instruct_lm.evaluation.statistics import bootstrap_interval, holm, paired_difference
from instruct_lm.io.sweep_files import write_jobs
from instruct_lm.report import charts
from instruct_lm.report.comparison import compare, count_text, p_text, signed
from instruct_lm.report.evaluations import collect, load
from instruct_lm.report.page import picture, render
from instruct_lm.report.tables import markdown_text

from .run_folders import config_of, write_curves, write_evaluation, write_run

SCORES = [20.0, 30.0, 40.0, 10.0, 0.0, 50.0]
BETTER = [60.0, 50.0, 80.0, 40.0, 100.0, 70.0]
OTHER_JUDGE = {"kind": "openai", "model": "judge-1"}
CURVES = {
    "train/loss": [(0, 4.0), (1, 3.0), (2, 2.0)],
    "val/loss": [(0, 4.0), (2, 1.0)],
    "val/response_loss": [(0, 2.0), (2, 0.5)],
}


@pytest.fixture(autouse=True)
def a_wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def answers(n=6, tag="answer"):
    return [f"{tag} {i}" for i in range(n)]


@pytest.fixture
def pair(tmp_path):
    """Arguments for an untuned model and a run that does better."""
    write_evaluation(tmp_path / "untuned", answers(tag="old"), SCORES)
    write_run(tmp_path / "tuned", answers(tag="new"), BETTER, curves=CURVES)
    return [f"untuned={tmp_path / 'untuned'}", str(tmp_path / "tuned")]


@pytest.fixture
def sweep(tmp_path):
    """A multirun's folder: two weights, three seeds each; the tenth job comes after the ninth."""
    rng = np.random.default_rng(1)
    job = 8
    for weight in (0.0, 1.0):
        for seed in (1, 2, 3):
            scores = rng.uniform(0, 100, 6).round(1).tolist()
            folder = tmp_path / "sweep" / f"{job}_weight-{weight}_seed-{seed}"
            write_run(folder, answers(tag=f"{weight}"), scores, curves=CURVES, config=config_of(seed, weight))
            job += 1
    return tmp_path / "sweep"


def rows(text, title):
    """Name of the first column → the other cells, of the table under a title, whose columns start at its header's."""
    header, rule, *lines = text.split(f"{title}\n\n")[1].split("\n\n")[0].splitlines()
    starts = [0, *(found.end() for found in re.finditer("-  ", rule))]
    cells = [
        [line[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
        for line in (header, rule, *lines)
    ]
    return {row[0]: dict(zip(cells[0][1:], row[1:], strict=True)) for row in cells[2:]}


def run(capsys, *arguments):
    status = report.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_table_holds_what_a_hand_computes(pair, capsys):
    status, out, err = run(capsys, *pair)
    assert (status, err) == (0, "")
    low, high = bootstrap_interval(SCORES)
    assert rows(out, "Scores")["untuned"]["score"] == f"25.0 [{low:.1f}, {high:.1f}]"
    assert rows(out, "Scores")["tuned"]["exact match"].startswith("1 of 6 [0, ")
    assert rows(out, "Scores")["tuned"]["ended"] == "75%"
    difference = rows(out, "Differences from untuned")["tuned"]
    low, high = bootstrap_interval(np.subtract(BETTER, SCORES))
    assert difference["score"] == f"+41.7 [+{low:.1f}, +{high:.1f}]"
    assert difference["p"] == "0.031"  # 2 of the 64 signs
    assert difference["entries needed"] == "5"  # spread 29.94: (2.8016 * 29.94 / 41.67)^2 = 4.05
    assert f"tuned is better than untuned by 41.7 ± {(high - low) / 2:.1f}, p = 0.031." in " ".join(out.split())


def test_a_run_tells_its_losses_and_costs(pair, capsys):
    assert rows(run(capsys, *pair)[1], "Training runs") == {
        "tuned": {
            "score": "66.7",
            "validation loss": "4.000 → 1.000",
            "response loss": "2.000 → 0.500",
            "steps": "68",
            "minutes": "1.5",
            "tokens/s": "1,234",
            "peak GB": "1.50",
        }
    }


def test_a_handful_of_answers_is_shown_side_by_side(pair, capsys):
    out = run(capsys, *pair)[1]
    shown = out[out.index("Entry 1\n") :]
    assert shown.count("Entry ") == 5
    assert "  Question 0?\n  reference: Answer 0.\n  untuned [20]: old 0\n  tuned [60]: new 0\n" in shown
    assert "new 5" in shown


def test_an_answer_that_some_seeds_gave_names_these(tmp_path, capsys):
    for seed, last in ((1, "same"), (2, "same"), (3, "other")):
        write_run(tmp_path / "runs" / f"{seed}", ["all", last], [50.0, 60.0 + seed], config=config_of(seed))
    out = run(capsys, tmp_path / "runs", "--md", tmp_path / "r.md")[1]
    assert "  1 [50]: all\n" in out
    assert "  1 (seed 1, 2) [61, 62]: same\n  1 (seed 3) [63]: other\n" in out


def test_half_a_surrogate_pair_does_not_stop_the_report(tmp_path, capsys):
    write_evaluation(tmp_path / "a", ["half \ud83d", "whole"], [1.0, 2.0])
    status, out, _ = run(capsys, tmp_path / "a", "--md", tmp_path / "r.md", "--html", tmp_path / "r.html")
    assert (status, r"half \ud83d" in out) == (0, True)
    assert "half ?" in (tmp_path / "r.md").read_text(encoding="utf-8")
    assert "half ?" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_terminal_gets_no_control_characters(tmp_path, capsys):
    write_evaluation(tmp_path / "a", ["\x1b[2J red\x07", "\ttab\u202e"], [1.0, 2.0])
    out = run(capsys, tmp_path / "a")[1]
    assert r"\x1b[2J red\x07" in out
    assert r"tab\u202e" in out
    assert not set("\x1b\x07\u202e") & set(out)


def test_noise_is_called_noise(tmp_path, capsys):
    rng = np.random.default_rng(3)
    scores, noise = rng.uniform(20, 80, 110), rng.normal(0, 20, 110)
    others = scores + noise - noise.mean() + 1
    for name, values in (("a", scores), ("b", others)):
        write_evaluation(tmp_path / name, answers(110), values.tolist())
    out = " ".join(run(capsys, tmp_path / "a", tmp_path / "b")[1].split())
    found = paired_difference(others, scores)
    assert found.p_value > 0.1
    assert (
        f"b against a: no difference that 110 entries can show: {signed(found.mean)} ± {found.margin:.1f}, "
        f"p = {found.p_value:.2f}. To show it, about {count_text(found.entries_needed)} entries would be needed."
    ) in out


def test_seeds_with_other_entries_are_no_setting_together(tmp_path):
    for seed in (1, 2):  # such as with data.shuffle=true
        questions = [(f"Question {seed}?", "", "Yes."), ("Really?", "", "Yes.")]
        write_run(tmp_path / f"{seed}", ["a", "b"], [50.0, 60.0], config=config_of(seed), questions=questions)
    settings = compare(collect([str(tmp_path)])[0]).settings
    assert [(setting.seeds, len(setting.runs)) for setting in settings] == [((1,), 1), ((2,), 1)]


def test_seeds_of_a_multirun_are_one_setting(sweep):
    comparison = compare(collect([str(sweep)])[0])
    assert [setting.name for setting in comparison.settings] == ["prompt weight=0", "prompt weight=1"]
    assert [setting.seeds for setting in comparison.settings] == [(1, 2, 3), (1, 2, 3)]
    first, second = (setting.values("score") for setting in comparison.settings)
    assert comparison.contrasts[0].differences["score"] == paired_difference(second, first, same_seeds=True)
    assert "6 entries and 3 seeds" in comparison.contrasts[0].sentence
    assert [r.name for r in comparison.runs][:2] == ["prompt weight=0, seed 1", "prompt weight=0, seed 2"]


def test_trained_settings_are_compared_with_the_untuned_one_and_each_other(sweep, tmp_path):
    write_evaluation(tmp_path / "untuned", answers(), SCORES)
    comparison = compare(collect([f"untuned={tmp_path / 'untuned'}", str(sweep)])[0])
    names = ["prompt weight=0", "prompt weight=1"]
    pairs = [(contrast.baseline.name, contrast.setting.name) for contrast in comparison.contrasts]
    assert pairs == [("untuned", names[0]), ("untuned", names[1]), tuple(names)]
    p_values = [contrast.differences["score"].p_value for contrast in comparison.contrasts]
    assert [contrast.p_value for contrast in comparison.contrasts] == [*holm(p_values[:2]), p_values[2]]
    chosen = compare(collect([f"untuned={tmp_path / 'untuned'}", str(sweep)])[0], [names[1]])
    assert {contrast.baseline.name for contrast in chosen.contrasts} == {names[1]}


def test_the_untuned_models_of_a_multirun_come_with_it(sweep):
    untuned = sweep / "8_weight-0.0_seed-1" / "evaluation" / "test-untuned"
    write_evaluation(untuned, answers(), SCORES)
    trained = ["prompt weight=0", "prompt weight=1"]
    assert [setting.name for setting in compare(collect([str(sweep)])[0]).settings] == trained  # no multirun: as named
    write_jobs(sweep, {folder.name: [] for folder in sweep.iterdir()})
    assert [setting.name for setting in compare(collect([str(sweep)])[0]).settings] == ["untuned", *trained]
    settings = compare(collect([str(sweep), f"before={untuned}"])[0]).settings  # once, as it is given
    assert [setting.name for setting in settings] == [*trained, "before"]
    write_evaluation(sweep / "9_weight-0.0_seed-2" / "evaluation" / "test-untuned", answers(), SCORES)
    settings = compare(collect([f"before={untuned}", str(sweep)])[0]).settings  # no other than the one given
    assert [setting.name for setting in settings] == ["before", *trained]


def test_runs_given_by_themselves_are_not_put_together(sweep):
    folders = sorted(map(str, sweep.iterdir()))
    comparison = compare(collect([f"a={folders[0]}", folders[1]])[0])
    assert [setting.name for setting in comparison.settings] == ["a", Path(folders[1]).name]


def test_settings_that_follow_from_a_name_are_not_listed(tmp_path, capsys):
    for name, layers, rate in (("small", 2, 0.1), ("large", 4, 0.1), ("large", 4, 0.2)):
        config = config_of(model={"name": name, "n_layer": layers}, optimizer={"lr": rate})
        write_run(tmp_path / "runs" / f"{name}-{rate}", answers(), SCORES, config=config)
    assert rows(run(capsys, tmp_path / "runs")[1], "Settings that differ") == {
        "model=large, lr=0.1": {"model": "large", "lr": "0.1"},
        "model=large, lr=0.2": {"model": "large", "lr": "0.2"},
        "model=small, lr=0.1": {"model": "small", "lr": "0.1"},
    }


def test_other_test_sets_are_not_paired(tmp_path, capsys):
    write_evaluation(tmp_path / "a", answers(), SCORES)
    write_evaluation(tmp_path / "b", answers(), BETTER, questions=[(f"Else {i}?", "", "Yes.") for i in range(6)])
    status, out, _ = run(
        capsys, tmp_path / "a", tmp_path / "b", "--md", tmp_path / "r.md", "--html", tmp_path / "r.html"
    )
    assert status == 0
    assert "b and a answered different entries: their scores cannot be paired." in out
    assert set(rows(out, "Scores")) == {"a", "b"}
    assert "Differences from" not in out
    assert "Else 1?" not in (tmp_path / "r.html").read_text()


def test_scores_of_different_judges_are_not_compared_but_their_agreement_is_told(tmp_path, capsys):
    write_evaluation(tmp_path / "a", answers(), SCORES)
    write_evaluation(tmp_path / "b", answers(), [2 * score for score in SCORES], judge=OTHER_JUDGE)
    out = run(capsys, tmp_path / "a", tmp_path / "b")[1]
    assert "score" not in rows(out, "Differences from a")["b"]
    assert "in chrF" in out
    assert "Their judges differ: the scores are not compared." in " ".join(out.split())
    assert rows(out, "Agreement of judges on the same answers")["a and b"] == {
        "entries": "6",
        "Pearson": "1.00",
        "Spearman": "1.00",
        "Kendall": "1.00",
    }


def test_failed_entries_are_counted_and_left_out_of_the_pairs(tmp_path, capsys):
    write_evaluation(tmp_path / "a", answers(), SCORES)
    write_evaluation(tmp_path / "b", answers(), [None, *BETTER[1:]], failures=[(0, "HTTP 500")])
    out = run(capsys, tmp_path / "a", tmp_path / "b")[1]
    assert rows(out, "Scores")["b"]["without a score"] == "1"
    expected = sum(BETTER[1:]) / 5 - sum(SCORES[1:]) / 5
    assert rows(out, "Differences from a")["b"]["score"].startswith(f"+{expected:.1f} ")


def test_without_a_judge_chrf_decides(tmp_path, capsys):
    for name in ("a", "b"):
        write_evaluation(tmp_path / name, answers(), [None] * 6, judge={"kind": "none"})
    status, out, _ = run(capsys, tmp_path / "a", tmp_path / "b", "--html", tmp_path / "r.html")
    assert status == 0
    assert "score" not in rows(out, "Scores")["a"]
    assert "0.0 ± 0.0 in chrF, p = 1.00." in " ".join(out.split())


def test_test_entries_that_stand_in_training_are_reported_apart(tmp_path, capsys):
    questions = [(f"Question {i}?", "", f"Answer {i}.") for i in range(20)]
    questions[17] = ("question  3?", "", "Three.")  # as in training, but for case and spacing
    source = tmp_path / "data.json"
    source.write_text(json.dumps([dict(zip(("instruction", "input", "output"), q, strict=True)) for q in questions]))
    config = config_of(source=str(source))
    config["data"]["train_fraction"] = 0.8
    test = questions[16:18]
    write_run(tmp_path / "run", answers(2), [30.0, 90.0], config=config, questions=test)
    out = run(capsys, tmp_path / "run")[1]
    row = rows(out, "Test entries that are also in the training split")["run"]
    assert row == {
        "also in training": "1",
        "score of these": "90.0 [90.0, 90.0]",
        "score of the others": "30.0 [30.0, 30.0]",
    }
    text = "Test entries that are also in the training split: "
    assert f"{text}1 (same prompt)." in " ".join(out.split())
    assert load(tmp_path / "run" / "evaluation" / "test").seen == [1]
    source.unlink()
    assert load(tmp_path / "run" / "evaluation" / "test").seen is None
    out = " ".join(run(capsys, tmp_path / "run")[1].split())
    assert f"{text}unknown for run, whose data file is not on this machine." in out


def test_losses_are_read_in_order_and_the_last_of_a_repeated_step_counts(tmp_path):
    folder = write_run(tmp_path / "run", answers(), SCORES, curves={"val/loss": [(0, 4.0), (5, 3.0), (9, 2.5)]})
    write_curves(folder / "tensorboard", {"val/loss": [(9, 2.0), (12, float("nan")), (15, 1.0)]})
    assert load(folder / "evaluation" / "test").curves == {"val/loss": [(0, 4.0), (5, 3.0), (9, 2.0), (15, 1.0)]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["x=nowhere"], "nowhere: no such folder"),
        (["empty"], "empty holds no evaluation. Make one: python evaluate.py run=empty"),
        (["trained"], "trained holds no evaluation. Make one: python evaluate.py run=trained"),
        (["sweep"], "run=sweep/0_seed-1"),
        (["x=outputs"], "Leave out x="),
        (["good", "good"], "given twice"),
        (["good", "--baseline", "bad"], "--baseline bad: there is no such setting. Choose one of: good."),
        (["torn"], "scores.jsonl has 5 of 6 entries whole: the evaluation was interrupted"),
        (["unscored"], "scores.jsonl has 0 of 6 entries whole: the evaluation was interrupted"),
        (["broken"], "summary.json is missing, damaged or of another version"),
        (["textless"], "responses.json is not the file that summary.json was made from"),
        (["listed"], "summary.json is missing, damaged or of another version"),
        (["flipped"], "scores.jsonl has 5 of 6 entries whole"),
        (["good", "--html", "good"], "good cannot be written"),
        (["good", "--md", "good/summary.json"], "--md good/summary.json would replace a file of a run"),
        (["good", "--svg", "trained/checkpoints/a.svg"], "belongs to the run trained alone"),
    ],
)
def test_bad_input_ends_with_status_2_and_the_remedy(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    write_run(Path("trained"))
    write_run(Path("sweep", "0_seed-1"))
    for name in ("good", "torn", "unscored", "flipped", "broken", "listed", "textless"):
        write_evaluation(Path(name), answers(), SCORES)
    write_evaluation(Path("outputs", "one"), answers(), SCORES)
    scores = Path("torn", "scores.jsonl")
    scores.write_bytes(scores.read_bytes()[:-20])
    Path("unscored", "scores.jsonl").unlink()
    flipped = Path("flipped", "scores.jsonl")
    flipped.write_text(flipped.read_text().replace('"rouge_l": 50.0', '"rouge_l": 58.0', 1))  # one bit
    Path("broken", "summary.json").write_text("{")
    Path("listed", "summary.json").write_text("[1]")
    Path("textless", "responses.json").write_text('[{"instruction": "a", "output": "b"}]')
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert message in err
    assert "Traceback" not in err


def test_runs_of_a_multirun_that_wait_for_evaluation_are_named(sweep, capsys):
    write_run(sweep / "14_seed-4")
    status, out, err = run(capsys, sweep)
    assert status == 0
    assert f"python evaluate.py run={sweep / '14_seed-4'}" in err
    assert len(rows(out, "Training runs")) == 6


def test_an_evaluation_elsewhere_finds_its_run(tmp_path):
    folder = write_run(tmp_path / "run")
    evaluation = write_evaluation(tmp_path / "second-opinion", answers(), SCORES, run=folder)
    assert load(evaluation).run == folder
    assert load(evaluation).training["steps"] == 68


def test_what_is_given_beside_the_run_is_the_evaluations_own(tmp_path):
    folder = write_run(tmp_path / "run", answers(), SCORES)
    settings = load(folder / "evaluation" / "test").settings
    assert settings["generation.max_new_tokens"] == 64  # the run's configuration says 256
    assert "output_dir" not in settings


def test_markdown_shows_every_character_as_it_is(pair, tmp_path, capsys):
    status, _, _ = run(capsys, *pair, "--md", tmp_path / "r.md")
    text = (tmp_path / "r.md").read_text(encoding="utf-8")
    assert status == 0
    assert text.startswith("# gpt2-tiny on sample: untuned, tuned\n\n- tuned is better than untuned by ")
    assert "- tuned [100]: new 4" in text
    assert text.index("### Entry 5") < text.index("### Entry 1")  # 0 against 100
    assert markdown_text("a|b\n*c* <b> `d` [e](f) &lt; x_y _z_ 1 < 2") == (
        r"a\|b<br>\*c\* &lt;b> \`d\` [e\](f) &amp;lt; x_y \_z\_ 1 < 2"
    )


def test_other_code_writes_a_report_by_one_call(pair, tmp_path, capsys):
    files = {name: tmp_path / f"r.{name}" for name in ("html", "md", "svg")}
    report.write_report(pair[::-1], **files, baselines=["tuned"], title="Both")
    assert "untuned is worse than tuned by 41.7" in " ".join(capsys.readouterr().out.split())
    assert files["md"].read_text(encoding="utf-8").startswith("# Both\n\n- untuned is worse")
    assert "<h1>Both</h1>" in files["html"].read_text(encoding="utf-8")
    assert files["svg"].read_text(encoding="utf-8").startswith("<svg ")
    with pytest.raises(InputError, match="nowhere: no such folder"):
        report.write_report(["nowhere"])


def test_numbers_in_words():
    assert [signed(value) for value in (1.84, -1.84, 0.04, -0.04)] == ["+1.8", "−1.8", "0.0", "0.0"]
    assert [p_text(value) for value in (0.0004, 0.0123, 0.391)] == ["p < 0.001", "p = 0.012", "p = 0.39"]


def test_shares_of_a_histogram():
    assert charts.bin_shares(np.array([0.0, 9.9, 10.0, 100.0])).tolist() == [0.5, 0.25, 0, 0, 0, 0, 0, 0, 0, 0.25]


def test_thinned_points_are_means():
    assert charts.thin([(0, 1.0), (1, 3.0), (2, 5.0)], at_most=2) == [(0.5, 2.0), (2.0, 5.0)]


SVG = "{http://www.w3.org/2000/svg}"


class Chart:
    """One pair of axes in an SVG by Matplotlib: the numbers at the horizontal axis, and what stands between the axes."""

    def __init__(self, axes):
        self.parts = [part for part in axes.findall(f"{SVG}g") if ".axis_" not in part.get("id", "")]
        ticks = [tick for tick in axes.iter(f"{SVG}g") if "-xtick_" in tick.get("id", "")]
        self.ticks = {number(tick.find(f".//{SVG}text").text): float(dots(tick)[0][0]) for tick in ticks}
        self.texts = [text.text for part in self.parts for text in part.iter(f"{SVG}text")]

    def x(self, value):
        """Where the axis has a value."""
        low, high = min(self.ticks), max(self.ticks)
        return self.ticks[low] + (value - low) / (high - low) * (self.ticks[high] - self.ticks[low])

    def drawn(self, style):
        """(points of the line, dots) of each part whose path has this style."""
        paths = [
            (part, path) for part in self.parts for path in part.findall(f"{SVG}path") if style in path.get("style")
        ]
        return [
            ([tuple(map(float, p)) for p in re.findall(r"[ML] (\S+) (\S+)", path.get("d"))], dots(part))
            for part, path in paths
        ]


def dots(part):
    return [(float(use.get("x")), float(use.get("y"))) for use in part.iter(f"{SVG}use")]


def number(text):
    return float(text.replace("−", "-"))


def charts_of(svg):
    return [Chart(part) for part in svg.iter(f"{SVG}g") if "-axes_" in part.get("id", "")]


def test_the_picture_is_an_svg_file_of_its_own(pair, tmp_path, capsys):
    assert run(capsys, *pair, "--svg", tmp_path / "r.svg")[0] == 0
    root = ET.parse(tmp_path / "r.svg").getroot()
    assert root.tag == f"{SVG}svg"
    assert "prefers-color-scheme: dark" in root.find(f"{SVG}style").text
    means, differences = charts_of(root)
    assert means.texts[0::2] == ["untuned", "tuned"]
    assert differences.texts[0::2] == ["tuned"]
    # The dot stands right of the line at 0 by as much as the axis says.
    ((zero, _),) = differences.drawn("stroke-dasharray")
    assert [x for x, _ in zero] == pytest.approx([differences.x(0)] * 2)
    mean, start, end = map(number, re.findall(r"[+−]?[\d.]+", differences.texts[1]))
    ((line, _),) = differences.drawn("stroke: var(--c1)")
    assert [x for x, _ in line] == pytest.approx([differences.x(start), differences.x(end)], abs=1)
    ((x, y),) = (dot for part in differences.parts for dot in dots(part))
    assert x == pytest.approx(differences.x(mean), abs=1)
    assert y == line[0][1] == line[1][1]
    assert mean == pytest.approx(np.mean(BETTER) - np.mean(SCORES), abs=0.05)


def test_a_picture_is_the_same_each_time_and_names_no_date(pair):
    comparison = compare(collect(pair)[0])
    assert picture(comparison) == picture(comparison)
    assert not re.search(r"\b20\d\d-\d\d|#[0-9a-f]{6}\b", picture(comparison).partition("</style>")[2])


def test_names_in_charts_are_no_markup_and_no_formula():
    name = '$x_1$ <b> "id=" #010003 & 日本 ' + "long " * 20
    row = (name, (1.0, 0.0, 2.0), "1.0", 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = charts.interval_charts([charts.Intervals("t", [row], name[:20])])
        curve = charts.line_chart(name, [(name, [(0, 1.0), (1, 1.5)], 9)], "step")
    chart = ET.fromstring(svg)
    assert charts_of(chart)[0].texts == [charts.clipped(name, 36), "1.0"]
    assert ET.fromstring(curve).get("aria-label") == name
    assert ET.fromstring(curve).find(f".//{SVG}title").text == f"{name}: 1.500 at 1"
    ((_, points),) = charts_of(ET.fromstring(curve))[0].drawn("stroke-dasharray")  # the tenth colour
    assert len(points) == 2


@pytest.mark.parametrize(
    ("losses", "labels"),
    [
        ((0.4, 4.0), ["0.5", "1", "2"]),
        ((0.6, 3.0), ["0.7", "1", "1.5", "2", "3"]),
        ((1.0, 1.9), ["1.0", "1.2", "1.4", "1.6", "1.8"]),
    ],
)
def test_losses_that_differ_by_more_than_a_factor_of_two_have_a_logarithmic_axis(losses, labels):
    svg = ET.fromstring(charts.line_chart("t", [("a", list(enumerate(losses)), 0)], "step"))
    ticks = [tick for tick in svg.iter(f"{SVG}g") if "-ytick_" in tick.get("id", "")]
    assert [tick.find(f".//{SVG}text").text for tick in ticks][-len(labels) :] == labels


# ---- the page ------------------------------------------------------------------------------------------------------

ATTACK = '<script>document.title = "hacked"</script><img src=x onerror="document.title = \'hacked\'"></p></div>$title'


class Page(HTMLParser):
    """What stands in a page: tags with their attributes, and its tables."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.texts, self.cell = [], {}, [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.rows = self.tables[dict(attrs)["aria-label"]] = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        self.cell &= tag not in ("th", "td")

    def handle_data(self, data):
        self.texts.append(data)
        if self.cell:
            self.rows[-1][-1] += data


@pytest.fixture
def page(tmp_path):
    """A page with an attack in every text that others write."""
    questions = [(f"Question {i}?", "", f"Answer {i}.") for i in range(6)]
    questions[2] = (f"ask {ATTACK}", f"input {ATTACK}", f"reference {ATTACK}")
    old, new = answers(tag="old"), answers(tag="new")
    old[2] = f"answer {ATTACK}"
    write_evaluation(tmp_path / "untuned", old, SCORES, questions=questions)
    config = config_of(data={**config_of()["data"], "source": ATTACK})
    write_run(tmp_path / "run", new, BETTER, questions=questions, curves=CURVES, config=config)
    loaded = collect([f"{ATTACK}={tmp_path / 'untuned'}", f"tuned={tmp_path / 'run'}"])[0]
    path = tmp_path / "page.html"
    path.write_text(render(compare(loaded), f"title {ATTACK}"), encoding="utf-8")
    return path


def test_the_page_needs_nothing_else(page):
    text = page.read_text(encoding="utf-8")
    tags = Page(text).tags
    assert not [tag for tag, _ in tags if tag in ("link", "img", "iframe", "object", "base", "form")]
    assert [attributes for tag, attributes in tags if tag == "script"] == [{}]
    for _, attributes in tags:
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"url\((?!#)|@import", text)


def test_the_page_is_marked_up_for_those_who_cannot_see_it(page):
    tags = Page(page.read_text(encoding="utf-8")).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in tags:
        for name in ("for", "aria-labelledby", "aria-controls"):
            assert attributes.get(name, ids[0]) in ids
        if tag == "a":
            assert attributes["href"][1:] in ids
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
        if tag == "svg":
            assert attributes.get("aria-hidden") or attributes["aria-label"]
    assert ("html", {"lang": "en"}) in tags
    assert {"input", "select"} <= {tag for tag, _ in tags}


def test_every_text_is_shown_as_it_is(page):
    texts = "".join(Page(page.read_text(encoding="utf-8")).texts)
    for start in ("ask", "input", "reference", "answer", "title"):
        assert f"{start} {ATTACK}" in texts


def test_the_charts_hold_every_curve(page):
    text = page.read_text(encoding="utf-8")
    drawn = [ET.fromstring(svg) for svg in re.findall("<svg .*?</svg>", text, re.DOTALL)]
    losses = {chart.get("aria-label"): chart for chart in drawn if "loss" in (chart.get("aria-label") or "")}
    assert set(losses) == {"Training loss", "Validation loss", "Validation loss of the responses"}
    (((first, second), points),) = charts_of(losses["Training loss"])[0].drawn("stroke: var(--c1)")  # without step 0
    assert points == [first, second]
    assert first[0] < second[0]
    assert first[1] < second[1]  # the loss falls, and so does the line: y grows downwards
    assert losses["Training loss"].find(f".//{SVG}title").text == "tuned: 2.000 at 2"
    histograms = [chart for chart in drawn if (chart.get("aria-label") or "").startswith("Distribution")]
    for chart in histograms:
        titles = [title.text for title in chart.iter(f"{SVG}title")]
        assert len(titles) == 10
        assert sum(number(title.split(": ")[1].rstrip("%")) for title in titles) == pytest.approx(100, abs=4)
    assert len(histograms) == 2
    assert [chart.get("aria-label") for chart in drawn if "Difference" in (chart.get("aria-label") or "")] == [
        f"Differences from {ATTACK}"
    ] * 2  # for phones and for screens


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """Opens a page in headless Chromium: the page as it stands after its script, and the console's messages."""
    names = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser", "chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("no chromium or google-chrome on the path")
    profile = tmp_path_factory.mktemp("profile")

    def dump(path):
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={profile}",
        ]
        command = [
            program,
            *options,
            "--enable-logging=stderr",
            "--virtual-time-budget=2000",
            "--dump-dom",
            path.as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=180)
        if done.returncode != 0 or "<html" not in done.stdout:
            pytest.skip(f"{program} does not start here: {done.stderr[-300:]}")
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return dump


def test_a_browser_reads_the_table_and_runs_no_text(page, chromium):
    text, console = chromium(page)
    assert console == []
    shown = Page(text)
    table = shown.tables["Scores"]
    assert table[0][:3] == ["setting", "score", "exact match"]
    low, high = bootstrap_interval(BETTER)
    assert table[2][:3] == ["tuned", f"66.7 [{low:.1f}, {high:.1f}]", table[2][2]]
    assert f"<title>title {ATTACK.split('<')[0]}" in text
    assert "<title>hacked" not in text
    articles = [attributes["data-index"] for tag, attributes in shown.tags if tag == "article"]
    assert articles == ["5", "1", "3", "4", "2", "6"]  # differences 100, 40, 40, 30, 20, 20
    assert "6 entries" in "".join(shown.texts)


def test_filter_order_and_a_narrow_screen_in_a_browser(page, chromium):
    # the page's policy would stop a script of the test's own
    text = re.sub(r"<meta http-equiv.*?>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    script = """<script>
    order.value = "low"; order.dispatchEvent(new Event("change"));
    filter.value = " NEW 3"; filter.dispatchEvent(new Event("input"));
    const page = document.documentElement;
    parent.postMessage([page.scrollWidth <= page.clientWidth, count.textContent, entries.map(e => e.node.dataset.index),
      entries.filter(e => !e.node.hidden).map(e => e.node.dataset.index)], "*");
    </script>"""
    page.with_name("inner.html").write_text(text.replace("</body>", f"{script}</body>"), encoding="utf-8")
    outer = page.with_name("outer.html")
    outer.write_text(
        "<html><script>onmessage = event => { document.title = JSON.stringify(event.data) }</script>"
        '<iframe src="inner.html" style="width: 360px; height: 800px; border: 0"></iframe></html>'
    )
    seen = json.loads(re.search("<title>(.*?)</title>", chromium(outer)[0])[1])
    assert seen == [True, "1 of 6 entries", ["5", "4", "1", "2", "3", "6"], ["4"]]


def test_the_report_imports_no_torch_and_without_charts_no_matplotlib_and_prints_on_any_terminal(pair):
    code = "import sys; from instruct_lm.commands.report import main; main(sys.argv[1:]); assert not {'torch', 'matplotlib'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}  # a terminal without a minus sign
    done = subprocess.run([sys.executable, "-c", code, *pair], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
