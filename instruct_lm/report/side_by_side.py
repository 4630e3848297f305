"""The answers of several evaluations side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from instruct_lm.report.comparison import Comparison
from instruct_lm.report.evaluations import Evaluation
from instruct_lm.report.settings import Setting, questions


@dataclass(frozen=True)
class Answer:
    """What some evaluations answered alike.

    Attributes:
        text: The answer.
        by: Who gave it: settings, with seeds where not all of a setting's gave it.
        scores: One an evaluation; None where there is none.
        setting: Number of the first one's setting.
    """

    text: str
    by: str
    scores: Sequence[float | None]
    setting: int

    @property
    def scores_text(self) -> str:
        """`85`, `60, 85` if they differ, `–` for none."""
        return ", ".join(dict.fromkeys("–" if score is None else f"{score:.0f}" for score in self.scores))


@dataclass(frozen=True)
class Entry:
    """An entry with all its answers.

    Attributes:
        number: Its place in the responses, from 1.
        instruction: The instruction.
        input: Its input, if any.
        reference: The reference answer.
        answers: In the order of the settings; the same text only once.
    """

    number: int
    instruction: str
    input: str
    reference: str
    answers: Sequence[Answer]

    @property
    def scores(self) -> list[float]:
        """All that are known."""
        return [score for answer in self.answers for score in answer.scores if score is not None]

    @property
    def spread(self) -> float:
        """Largest minus smallest score; 0 if there are none."""
        return max(self.scores, default=0.0) - min(self.scores, default=0.0)


def side_by_side(comparison: Comparison) -> list[Entry]:
    """The entries of the first setting, in their order, with the answers of all settings that answered the same."""
    first = comparison.runs[0]
    settings = [(i, s) for i, s in enumerate(comparison.settings) if questions(s.runs[0]) == questions(first)]
    return [_entry(index, first, settings, comparison.headline) for index in range(len(first.entries))]


def by_disagreement(entries: Sequence[Entry]) -> list[Entry]:
    """Those first whose scores lie furthest apart."""
    return sorted(entries, key=lambda entry: -entry.spread)


def evenly(entries: Sequence[Entry], count: int) -> list[Entry]:
    """A few from all over the set, chosen without a look at their answers."""
    places = np.linspace(0, len(entries) - 1, min(count, len(entries))).round().astype(int)
    return [entries[place] for place in places]


def _entry(index: int, first: Evaluation, settings: Sequence[tuple[int, Setting]], metric: str) -> Entry:
    alike: dict[str, list[tuple[int, Setting, Evaluation]]] = defaultdict(list)
    for place, setting in settings:
        for run in setting.runs:
            alike[run.entries[index]["model_response"]].append((place, setting, run))
    answers = [
        Answer(text, _by(found), [_score(run, index, metric) for _, _, run in found], found[0][0])
        for text, found in alike.items()
    ]
    entry = first.entries[index]
    return Entry(index + 1, entry["instruction"], entry["input"], entry["output"], answers)


def _by(found: Sequence[tuple[int, Setting, Evaluation]]) -> str:
    names = []
    for _, group in groupby(found, key=lambda item: item[0]):
        members = list(group)
        setting = members[0][1]
        seeds = ", ".join(str(run.settings.get("seed")) for _, _, run in members)
        everyone = len(members) == len(setting.runs)
        names.append(setting.name if everyone else f"{setting.name} (seed {seeds})")
    return "; ".join(names)


def _score(run: Evaluation, index: int, metric: str) -> float | None:
    value = float(run.values[metric][index])
    return None if np.isnan(value) else value
