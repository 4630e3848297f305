"""The answers of several evaluations side by side."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from instruct_lm.data.conversation import Conversation
from instruct_lm.report.comparison import Comparison
from instruct_lm.report.settings import Setting


@dataclass(frozen=True)
class SharedAnswer:
    """An answer and all evaluations that gave it.

    Attributes:
        text: The answer.
        by: Names of the settings that gave it, or of the runs where not all of a setting's did.
        scores: One per evaluation; NaN where there is no score.
        setting: Number of the first one's setting, from 0.
    """

    text: str
    by: str
    scores: Sequence[float]
    setting: int

    @property
    def scores_text(self) -> str:
        """`85`, `60, 85` if they differ, `–` for no score."""
        return ", ".join(dict.fromkeys("–" if np.isnan(score) else f"{score:.0f}" for score in self.scores))


@dataclass(frozen=True)
class ComparedEntry:
    """An entry with the answers of all settings.

    Attributes:
        number: Its place in the responses, from 1.
        example: The entry.
        answers: In the order of the settings; equal texts are one answer.
    """

    number: int
    example: Conversation
    answers: Sequence[SharedAnswer]

    @property
    def scores(self) -> list[float]:
        """All known scores."""
        return [score for answer in self.answers for score in answer.scores if not np.isnan(score)]

    @property
    def spread(self) -> float:
        """Largest minus smallest score; 0 if there are none."""
        return max(self.scores, default=0.0) - min(self.scores, default=0.0)


def side_by_side(comparison: Comparison) -> list[ComparedEntry]:
    """The entries of the first setting, in their order, with the answers of all settings that have the same entries."""
    examples, metric = comparison.runs[0].examples, comparison.headline
    settings = [(i, s) for i, s in enumerate(comparison.settings) if s.runs[0].examples == examples]
    return [
        ComparedEntry(index + 1, example, _shared_answers(index, settings, metric))
        for index, example in enumerate(examples)
    ]


def by_disagreement(entries: Sequence[ComparedEntry]) -> list[ComparedEntry]:
    """The entries with the largest spread of scores first."""
    return sorted(entries, key=lambda entry: -entry.spread)


def evenly(entries: Sequence[ComparedEntry], count: int) -> list[ComparedEntry]:
    """At most `count` entries, evenly spaced over the set, whatever their answers."""
    places = np.linspace(0, len(entries) - 1, min(count, len(entries))).round().astype(int)
    return [entries[place] for place in places]


def _shared_answers(index: int, settings: Sequence[tuple[int, Setting]], metric: str) -> list[SharedAnswer]:
    """The different answers to the entry with this index."""
    given: dict[str, list[tuple[str, float, int]]] = defaultdict(list)  # answer → (by, score, number of the setting)
    for number, setting in settings:
        alike = len({run.answers[index] for run in setting.runs}) == 1
        for run in setting.runs:
            by = setting.name if alike else run.name
            given[run.answers[index]].append((by, float(run.values[metric][index]), number))
    answers = []
    for text, givers in given.items():
        names, scores, numbers = zip(*givers, strict=True)
        answers.append(SharedAnswer(text, "; ".join(dict.fromkeys(names)), scores, numbers[0]))
    return answers
