"""The answers of several evaluations side by side."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from instruct_lm.report.comparison import Comparison
from instruct_lm.report.evaluations import Evaluation
from instruct_lm.report.settings import Setting, questions


@dataclass(frozen=True)
class SharedAnswer:
    """An answer and all evaluations that gave it.

    Attributes:
        text: The answer.
        by: Names of the settings that gave it, with seeds where not all of a setting's runs did.
        scores: One per evaluation; None where there is no score.
        setting: Number of the first one's setting, from 0.
    """

    text: str
    by: str
    scores: Sequence[float | None]
    setting: int

    @property
    def scores_text(self) -> str:
        """`85`, `60, 85` if they differ, `–` for no score."""
        return ", ".join(dict.fromkeys("–" if score is None else f"{score:.0f}" for score in self.scores))


@dataclass(frozen=True)
class ComparedEntry:
    """An entry with the answers of all settings.

    Attributes:
        number: Its place in the responses, from 1.
        instruction: The instruction.
        input: Its input; empty if it has none.
        reference: The reference answer.
        answers: In the order of the settings; equal texts are one answer.
    """

    number: int
    instruction: str
    input: str
    reference: str
    answers: Sequence[SharedAnswer]

    @property
    def scores(self) -> list[float]:
        """All known scores."""
        return [score for answer in self.answers for score in answer.scores if score is not None]

    @property
    def spread(self) -> float:
        """Largest minus smallest score; 0 if there are none."""
        return max(self.scores, default=0.0) - min(self.scores, default=0.0)


def side_by_side(comparison: Comparison) -> list[ComparedEntry]:
    """The entries of the first setting, in their order, with the answers of all settings that have the same entries."""
    first = comparison.runs[0]
    settings = [(i, s) for i, s in enumerate(comparison.settings) if questions(s.runs[0]) == questions(first)]
    entries = []
    for index, entry in enumerate(first.entries):
        answers = _shared_answers(index, settings, comparison.headline)
        entries.append(ComparedEntry(index + 1, entry["instruction"], entry["input"], entry["output"], answers))
    return entries


def by_disagreement(entries: Sequence[ComparedEntry]) -> list[ComparedEntry]:
    """The entries with the largest spread of scores first."""
    return sorted(entries, key=lambda entry: -entry.spread)


def evenly(entries: Sequence[ComparedEntry], count: int) -> list[ComparedEntry]:
    """At most `count` entries, evenly spaced over the set, whatever their answers."""
    places = np.linspace(0, len(entries) - 1, min(count, len(entries))).round().astype(int)
    return [entries[place] for place in places]


def _shared_answers(index: int, settings: Sequence[tuple[int, Setting]], metric: str) -> list[SharedAnswer]:
    """The different answers to the entry with this index."""
    given: dict[str, dict[int, list[Evaluation]]] = defaultdict(lambda: defaultdict(list))  # text → setting → runs
    for number, setting in settings:
        for run in setting.runs:
            given[run.entries[index]["model_response"]][number].append(run)
    named, answers = dict(settings), []
    for text, by_setting in given.items():
        names = [_with_seeds(named[number], runs) for number, runs in by_setting.items()]
        values = [float(run.values[metric][index]) for runs in by_setting.values() for run in runs]
        scores = [None if np.isnan(value) else value for value in values]
        answers.append(SharedAnswer(text, "; ".join(names), scores, next(iter(by_setting))))
    return answers


def _with_seeds(setting: Setting, runs: Sequence[Evaluation]) -> str:
    """The setting's name, with the seeds of the runs if these are not all of its runs."""
    seeds = ", ".join(str(run.settings.get("seed")) for run in runs)
    return setting.name if len(runs) == len(setting.runs) else f"{setting.name} (seed {seeds})"
