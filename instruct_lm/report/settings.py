"""Which settings a report holds against each other: evaluations over their seeds, called by what differs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from instruct_lm.evaluation.statistics import interval
from instruct_lm.report.evaluations import METRICS, Evaluation

_NAMES = ("name", "kind", "style")  # keys that stand for their whole group


@dataclass(frozen=True, eq=False)
class Setting:
    """Evaluations that differ in their seed alone.

    Attributes:
        name: What a report calls it.
        runs: One evaluation a seed, of the same entries.
    """

    name: str
    runs: tuple[Evaluation, ...]

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """The seed of each run."""
        return tuple(run.settings.get("seed") for run in self.runs)

    def values(self, metric: str) -> np.ndarray:
        """(k, n) float64, NaN where there is no score."""
        return np.stack([run.values[metric] for run in self.runs])

    @cached_property
    def means(self) -> dict[str, tuple[float, float, float]]:
        """Metric → mean and ends of its 95% interval, over the entries that every run has a score for, if any."""
        means = {}
        for metric in METRICS:
            values = self.values(metric)
            values = values[:, ~np.isnan(values).any(axis=0)]
            if values.size:
                means[metric] = (float(values.mean()), *interval(values))
        return means


def group(evaluations: Sequence[Evaluation], keys: Sequence[str]) -> list[Setting]:
    """Put together what differs in the seed alone, and give unique names.

    An evaluation that stands alone keeps its name; the others are called by their values of `keys`.

    Args:
        evaluations: One or more.
        keys: What `differing` found.
    """
    groups: dict[Any, list[Evaluation]] = defaultdict(list)
    for number, run in enumerate(evaluations):
        decisive = {key: value for key, value in run.settings.items() if key != "seed"}
        groups[number if run.alone else json.dumps([decisive, questions(run)], sort_keys=True)].append(run)
    found: list[tuple[Evaluation, ...]] = []
    for runs in groups.values():
        repeated = len({run.settings.get("seed") for run in runs}) < len(runs)
        found += [(run,) for run in runs] if repeated else [tuple(runs)]

    taken: dict[str, int] = defaultdict(int)
    settings = []
    for members in found:
        name = _name(members, keys)
        taken[name] += 1
        name = name if taken[name] == 1 else f"{name} ({taken[name]})"
        several = len(members) > 1
        named = (replace(run, name=f"{name}, seed {run.settings['seed']}" if several else name) for run in members)
        settings.append(Setting(name, tuple(named)))
    return settings


def questions(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """(instruction, input, reference) of each entry: what must agree for scores to be paired."""
    return [(entry["instruction"], entry["input"], entry["output"]) for entry in evaluation.entries]


def differing(evaluations: Sequence[Evaluation]) -> list[str]:
    """Keys that have different values in the evaluations that have them, without those that follow from a name.

    `model.n_layer` follows from `model.name` if all evaluations of a model have the same.
    """
    values: dict[str, list[str]] = defaultdict(list)
    for run in evaluations:
        for key, value in run.settings.items():
            if key != "checkpoint" or value is not None:  # an untuned model has none
                values[key].append(_text(value))
    found = [key for key, texts in values.items() if len(set(texts)) > 1]
    return [key for key in found if not _follows(key, found, evaluations)]


def short(key: str) -> str:
    """`optimizer.lr` → `lr`, `model.name` → `model`."""
    first, _, last = key.rpartition(".")
    return first if last in _NAMES else last


def value_text(value: Any) -> str:
    """A configuration value as it would be typed."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _name(members: Sequence[Evaluation], keys: Sequence[str]) -> str:
    first = members[0]
    shown = [key for key in keys if key in first.settings and (key != "seed" or len(members) == 1)]
    if first.alone or first.run is None or not shown:
        return first.name
    return ", ".join(f"{short(key)}={value_text(first.settings[key])}" for key in shown)


def _follows(key: str, found: Sequence[str], evaluations: Sequence[Evaluation]) -> bool:
    """Whether a name that differs too, such as `model.name`, determines the value of `key` in the same group."""
    prefix, _, last = key.rpartition(".")
    owner = next((f"{prefix}.{name}" for name in _NAMES if f"{prefix}.{name}" in found), None)
    if owner is None or last in _NAMES:
        return False
    by_name: dict[str, set[str]] = defaultdict(set)
    for run in evaluations:
        if key in run.settings:
            by_name[_text(run.settings.get(owner))].add(_text(run.settings[key]))
    return all(len(values) == 1 for values in by_name.values())


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
