"""Settings compared with baselines: paired differences, and what they show in a sentence."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from instruct_lm.errors import InputError
from instruct_lm.evaluation.statistics import Difference, holm, paired_difference
from instruct_lm.io.sweep_files import Unfinished
from instruct_lm.report.evaluations import METRICS, Evaluation
from instruct_lm.report.lengths import thirds
from instruct_lm.report.settings import Setting, differing, group

LEVEL = 0.05  # of significance


@dataclass(eq=False)
class Contrast:
    """A setting compared with a baseline.

    Attributes:
        setting: The setting.
        baseline: The setting that is subtracted.
        differences: Metric → difference; empty if the entries are not the same.
        p_value: Of `metric`, adjusted for the number of settings that are compared with this baseline (Holm).
        comparisons: That number.
    """

    setting: Setting
    baseline: Setting
    differences: dict[str, Difference]
    p_value: float = 1.0
    comparisons: int = 1

    @property
    def metric(self) -> str:
        """The metric of the p-value: `score`, or `chrf` where the judges differ or there is no judge."""
        return "score" if "score" in self.differences else "chrf"

    @property
    def significant(self) -> bool:
        """Whether `metric` shows a difference at the 5% level."""
        found = self.differences.get(self.metric)
        return found is not None and self.p_value < LEVEL and (found.low > 0 or found.high < 0)

    @property
    def sentence(self) -> str:
        """What the comparison shows, in plain words."""
        name, base = self.setting.name, self.baseline.name
        if not self.differences:
            return f"{name} and {base} answered different entries: their scores cannot be paired."
        chance = p_text(self.p_value) + self.adjusted
        if self.significant:
            return f"{name} is {self.verdict} than {base} by {self.amount}, {chance}.{self.note}"
        shown = f"no difference that {self.evidence} can show: {self.size}, {chance}"
        return f"{name} against {base}: {shown}.{self.needed}{self.note}"

    @property
    def found(self) -> Difference:
        """The difference in `metric`."""
        return self.differences[self.metric]

    @property
    def unit(self) -> str:
        """Of sizes in sentences."""
        return "" if self.metric == "score" else " in chrF"

    @property
    def verdict(self) -> str:
        """`better` or `worse`."""
        return "better" if self.found.mean > 0 else "worse"

    @property
    def size(self) -> str:
        """`−1.0 ± 3.7`."""
        return f"{signed(self.found.mean)} ± {self.found.margin:.1f}{self.unit}"

    @property
    def amount(self) -> str:
        """`1.0 ± 3.7`, beside a verdict."""
        return f"{abs(self.found.mean):.1f} ± {self.found.margin:.1f}{self.unit}"

    @property
    def adjusted(self) -> str:
        """How many comparisons the p-value counts, in brackets; empty for one."""
        return f" (Holm, {self.comparisons} comparisons)" if self.comparisons > 1 else ""

    @property
    def evidence(self) -> str:
        """`110 entries and 3 seeds`."""
        seeds = max(self.found.seeds)
        return f"{self.found.entries} entries" + (f" and {seeds} seeds" if seeds > 1 else "")

    @property
    def needed(self) -> str:
        """A sentence on what would show the difference; empty where there is none."""
        if (count := self.found.entries_needed) is None:
            return ""
        enough = count <= self.found.entries
        return f" To show it, {'more seeds' if enough else f'about {count_text(count)} entries'} would be needed."

    @property
    def note(self) -> str:
        """A sentence where the judges differ."""
        same = _same_judge(self.setting, self.baseline)
        return "" if same else " Their judges differ: the scores are not compared."


@dataclass(frozen=True)
class Third:
    """A third of the entries, by the ratio of response length to prompt length.

    Attributes:
        low: Smallest ratio.
        high: Largest ratio.
        places: The entries.
        contrasts: Of the settings in question, over these entries; p-values adjusted for those of all thirds.
    """

    low: float
    high: float
    places: Sequence[int]
    contrasts: Sequence[Contrast]

    @property
    def name(self) -> str:
        """`ratio 0.06 to 0.45`."""
        return f"ratio {self.low:.2f} to {self.high:.2f}"


@dataclass(frozen=True)
class Comparison:
    """The content of a report.

    Attributes:
        settings: In the order given.
        keys: The configuration keys whose values differ.
        contrasts: Each setting compared with each baseline, a pair once.
        unfinished: Jobs of the multiruns among them that are not complete.
    """

    settings: list[Setting]
    keys: list[str]
    contrasts: list[Contrast]
    unfinished: Sequence[Unfinished] = ()

    @property
    def runs(self) -> list[Evaluation]:
        """All evaluations."""
        return [run for setting in self.settings for run in setting.runs]

    @property
    def paired(self) -> dict[str, list[Contrast]]:
        """A baseline's name → its contrasts whose entries are the same; only baselines that have some."""
        paired = [contrast for contrast in self.contrasts if contrast.differences]
        return {one.baseline.name: [other for other in paired if other.baseline is one.baseline] for one in paired}

    @property
    def question(self) -> Sequence[Contrast]:
        """The contrasts that the settings are about: between trained settings, else those with the first baseline."""
        trained = (
            [contrast for contrast in paired if contrast.setting.trained and contrast.baseline.trained]
            for paired in self.paired.values()
        )
        return next(filter(None, trained), next(iter(self.paired.values()), []))

    @cached_property
    def thirds(self) -> list[Third]:
        """The entries of the question by length ratio, the smallest first; empty if they are few."""
        if not self.question:
            return []
        baseline, parts = self.question[0].baseline, thirds(self.question[0].baseline.runs[0].examples)
        settings = [contrast.setting for contrast in self.question]
        contrasts = _against(baseline, settings, [part.places for part in parts])
        return [Third(*part, found) for part, found in zip(parts, contrasts, strict=True)]

    @property
    def headline(self) -> str:
        """The metric to show first: `score`, or `chrf` where there is no judge."""
        return "chrf" if all(np.isnan(run.values["score"]).all() for run in self.runs) else "score"


def compare(
    evaluations: Sequence[Evaluation], baselines: Sequence[str] = (), unfinished: Sequence[Unfinished] = ()
) -> Comparison:
    """Compare evaluations.

    Args:
        evaluations: One or more.
        baselines: Names of settings; none: the first setting and, if that is untuned, also the first trained one.
        unfinished: Jobs that a report is to list beside them.

    Raises:
        InputError: A baseline of an unknown name.
    """
    keys = differing(evaluations)
    settings = group(evaluations)
    named = {setting.name: setting for setting in settings}
    for name in baselines:
        if name not in named:
            raise InputError(f"--baseline {name}: there is no such setting. Choose one of: {'; '.join(named)}.")
    chosen = [named[name] for name in dict.fromkeys(baselines)] or settings[:1]
    trained = [setting for setting in settings if setting.trained]
    if not baselines and settings[0] not in trained and len(trained) > 1:
        chosen.append(trained[0])
    contrasts = []
    for i, baseline in enumerate(chosen):
        contrasts += _against(baseline, [setting for setting in settings if setting not in chosen[: i + 1]])[0]
    return Comparison(settings, keys, contrasts, unfinished)


def signed(value: float) -> str:
    """`+1.8`, `−1.8`, `0.0`: with a real minus sign, and no sign for what rounds to 0."""
    text = f"{value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def p_text(p_value: float) -> str:
    """`p < 0.001`, `p = 0.004`, `p = 0.39`."""
    digits = 3 if p_value < 0.1 else 2
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.{digits}f}"


def count_text(count: int) -> str:
    """An estimated count in two digits: `197` → `200`, `205,673` → `210,000`."""
    return f"{int(float(f'{count:.2g}')):,}"


def _against(
    baseline: Setting, settings: Sequence[Setting], parts: Sequence[Sequence[int] | None] = (None,)
) -> list[list[Contrast]]:
    """For each part of the entries (None: all) the contrasts with one baseline, p-values adjusted for their number."""
    contrasts = [
        [Contrast(setting, baseline, _differences(setting, baseline, places)) for setting in settings]
        for places in parts
    ]
    paired = [contrast for part in contrasts for contrast in part if contrast.differences]
    p_values = holm([contrast.found.p_value for contrast in paired])
    for contrast, p_value in zip(paired, p_values, strict=True):
        contrast.p_value, contrast.comparisons = p_value, len(paired)
    return contrasts


def _differences(setting: Setting, baseline: Setting, places: Sequence[int] | None = None) -> dict[str, Difference]:
    """Metric → difference over the same entries, of the metrics that some entry has on both sides."""
    differences: dict[str, Difference] = {}
    if setting.runs[0].examples != baseline.runs[0].examples:
        return differences
    for metric in METRICS if _same_judge(setting, baseline) else METRICS[1:]:
        first, second = setting.values(metric, places), baseline.values(metric, places)
        if not np.isnan(np.concatenate([first, second])).any(axis=0).all():
            differences[metric] = paired_difference(first, second, setting.seeds == baseline.seeds)
    return differences


def _same_judge(setting: Setting, baseline: Setting) -> bool:
    return bool(setting.runs[0].summary["judge"] == baseline.runs[0].summary["judge"])
