"""Thirds of the entries by length ratio: ratios, means and differences computed again from the files alone."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from instruct_lm.commands import report
from instruct_lm.data.conversation import Conversation, Turn
from instruct_lm.evaluation.statistics import holm, paired_difference
from instruct_lm.report.comparison import compare
from instruct_lm.report.evaluations import collect
from instruct_lm.report.lengths import length_ratios, thirds

from .run_folders import config_of, write_evaluation, write_run

N = 35
WEIGHTS, SEEDS = (0.0, 0.1, 1.0), (1, 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An untuned model and a sweep of three weights with two seeds, over entries of many lengths."""
    rng = np.random.default_rng(5)
    questions = [
        ("q" * rng.integers(5, 60) + str(i), "i" * rng.integers(0, 40), "r" * rng.integers(1, 90)) for i in range(N)
    ]
    write_evaluation(tmp_path / "untuned", ["x"] * N, rng.uniform(0, 100, N).tolist(), questions=questions)
    for weight in WEIGHTS:
        for seed in SEEDS:
            scores = rng.uniform(0, 100, N)
            scores[4] = 30 + 10 * seed
            run = tmp_path / "sweep" / f"{weight:g}-{seed}"
            write_run(run, ["y"] * N, scores.tolist(), questions=questions, config=config_of(seed, weight))
    return tmp_path


def by_hand(folder: Path) -> list[dict[float, float]]:
    """For each third, weight → mean score, from `responses.json` and `scores.jsonl` with nothing of the report."""
    means: list[dict[float, list[float]]] = [{weight: [] for weight in WEIGHTS} for _ in range(3)]
    for weight in WEIGHTS:
        for seed in SEEDS:
            evaluation = folder / "sweep" / f"{weight:g}-{seed}" / "evaluation" / "test"
            entries = json.loads((evaluation / "responses.json").read_text())
            lines = [json.loads(line) for line in (evaluation / "scores.jsonl").read_text().splitlines()]
            score = {line["index"]: line["score"] for line in lines}
            ratio = [len(entry["output"]) / len(entry["instruction"] + entry["input"]) for entry in entries]
            order = sorted(range(len(entries)), key=lambda place: (ratio[place], place))
            for third, places in enumerate((order[:12], order[12:24], order[24:])):
                means[third][weight] += [score[place] for place in places]
    return [{weight: sum(scores) / len(scores) for weight, scores in third.items()} for third in means]


def test_means_and_differences_of_the_thirds_are_those_of_the_files(folder: Path) -> None:
    arguments = [f"untuned={folder / 'untuned'}", str(folder / "sweep"), "--md", str(folder / "r.md")]
    assert report.main(arguments) == 0
    text = (folder / "r.md").read_text(encoding="utf-8")
    expected = by_hand(folder)

    def cells(title: str) -> dict[str, list[str]]:
        table = text.split(f"## {title}\n\n")[1].split("\n\n")[0].splitlines()[2:]
        rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]
        return {name: values for name, *values in rows}

    means = cells("Score by length of response to prompt")
    differences = cells("Differences from prompt weight=0 by length of response to prompt")
    assert list(means) == ["prompt weight=0", "prompt weight=0.1", "prompt weight=1"]
    assert list(differences) == ["prompt weight=0.1", "prompt weight=1"]
    for weight in WEIGHTS:
        shown = [float(cell.split(" [")[0]) for cell in means[f"prompt weight={weight:g}"]]
        assert shown == pytest.approx([third[weight] for third in expected], abs=0.0501)
    for weight in WEIGHTS[1:]:
        shown = [float(cell.split(" [")[0].replace("−", "-")) for cell in differences[f"prompt weight={weight:g}"]]
        assert shown == pytest.approx([third[weight] - third[0.0] for third in expected], abs=0.0501)


def test_the_thirds_have_their_own_intervals_and_p_values_for_all_of_them(folder: Path) -> None:
    comparison = compare(collect([f"untuned={folder / 'untuned'}", str(folder / "sweep")])[0])
    zero, *others = (setting for setting in comparison.settings if setting.trained)
    found = [
        paired_difference(setting.values("score")[:, third.places], zero.values("score")[:, third.places], True)
        for third in comparison.thirds
        for setting in others
    ]
    contrasts = [contrast for third in comparison.thirds for contrast in third.contrasts]
    assert [contrast.found for contrast in contrasts] == found
    assert [contrast.p_value for contrast in contrasts] == holm([one.p_value for one in found])
    assert {contrast.comparisons for contrast in contrasts} == {6}


def test_every_third_has_its_sentence_and_its_chart(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = folder / "r.html"
    assert report.main([f"untuned={folder / 'untuned'}", str(folder / "sweep"), "--html", str(page)]) == 0
    assert len(re.findall(r"^Ratio \d", capsys.readouterr().out, re.MULTILINE)) == 3
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r'<p class="told">Ratio \d', text)) == 3
    assert len(re.findall(r'aria-label="Differences from prompt weight=0, ratio [^"]*;[^"]*;[^"]*"', text)) == 2


def test_a_ratio_counts_all_texts_of_the_prompt() -> None:
    turns = (Turn("system", "abc"), Turn("user", "de"), Turn("assistant", "f"), Turn("user", "gh", "ij"))
    examples = [Conversation.of("Name it.", "a cat", "Tom"), Conversation((*turns, Turn("assistant", "klmno")))]
    assert length_ratios(examples).tolist() == [3 / 13, 5 / 10]


def test_thirds_have_the_same_size_and_few_entries_have_none() -> None:
    examples = [Conversation.of("abcd", "", "r" * (1 + 7 * i % 31)) for i in range(31)]  # lengths 1 to 31, mixed
    parts = thirds(examples)
    assert [len(part.places) for part in parts] == [11, 10, 10]
    assert [(part.low, part.high) for part in parts] == [(0.25, 2.75), (3.0, 5.25), (5.5, 7.75)]
    assert sorted(place for part in parts for place in part.places) == list(range(31))
    assert thirds(examples[:29]) == []
