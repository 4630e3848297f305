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
        by: Names of the settings that gave it, with the seeds where not all of a setting's did.
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
        spread: Largest minus smallest mean over the seeds of a trained setting (of any, if fewer than two are trained);
            0 if there are none.
    """

    number: int
    example: Conversation
    answers: Sequence[SharedAnswer]
    spread: float = 0.0

    @property
    def scores(self) -> list[float]:
        """All known scores."""
        return [score for answer in self.answers for score in answer.scores if not np.isnan(score)]


def side_by_side(comparison: Comparison) -> list[ComparedEntry]:
    """The entries of the first setting, in their order, with the answers of all settings that have the same entries."""
    examples, metric = comparison.runs[0].examples, comparison.headline
    settings = [(i, s) for i, s in enumerate(comparison.settings) if s.runs[0].examples == examples]
    trained = [setting for _, setting in settings if setting.trained]
    judged = trained if len(trained) > 1 else [setting for _, setting in settings]
    means = [_seed_means(setting.values(metric)) for setting in judged]
    return [
        ComparedEntry(index + 1, example, _shared_answers(index, settings, metric), _spread(of_entry))
        for index, (example, of_entry) in enumerate(zip(examples, np.transpose(means), strict=True))
    ]


def by_disagreement(entries: Sequence[ComparedEntry]) -> list[ComparedEntry]:
    """The entries on which the settings disagree most first."""
    return sorted(entries, key=lambda entry: -entry.spread)


def evenly(entries: Sequence[ComparedEntry], count: int) -> list[ComparedEntry]:
    """At most `count` entries, evenly spaced over the set, whatever their answers."""
    places = np.linspace(0, len(entries) - 1, min(count, len(entries))).round().astype(int)
    return [entries[place] for place in places]


def _seed_means(values: np.ndarray) -> np.ndarray:
    """(n,) means of (k, n) over the seeds that have a score; NaN where none has."""
    known = ~np.isnan(values)
    sums, counts = np.where(known, values, 0).sum(axis=0), known.sum(axis=0)
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)


def _spread(means: np.ndarray) -> float:
    known = means[~np.isnan(means)]
    return float(np.ptp(known)) if known.size else 0.0


def _shared_answers(index: int, settings: Sequence[tuple[int, Setting]], metric: str) -> list[SharedAnswer]:
    """The different answers to the entry with this index."""
    # answer → (number of the setting, the setting, seed, score) of each that gave it
    given: dict[str, list[tuple[int, Setting, int | None, float]]] = defaultdict(list)
    for number, setting in settings:
        for run, seed in zip(setting.runs, setting.seeds, strict=True):
            given[run.answers[index]].append((number, setting, seed, float(run.values[metric][index])))
    answers = []
    for text, givers in given.items():
        seeds: dict[str, list[str]] = defaultdict(list)
        for _, setting, seed, _ in givers:
            seeds[setting.name].append(str(seed))
        all_of = {setting.name for _, setting, _, _ in givers if len(seeds[setting.name]) == len(setting.runs)}
        by = [name if name in all_of else f"{name} (seed {', '.join(some)})" for name, some in seeds.items()]
        answers.append(SharedAnswer(text, "; ".join(by), [score for *_, score in givers], givers[0][0]))
    return answers
