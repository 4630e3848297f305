"""Settings: evaluations grouped over their seeds and named by the configuration keys that differ."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from instruct_lm.evaluation.statistics import bootstrap_interval
from instruct_lm.report.evaluations import Evaluation

_NAMES = ("name", "kind", "style", "rank")  # keys that stand for their whole group
_WORDS = {"prompt_loss_weight": "prompt weight", "lora.rank": "LoRA rank"}  # for other keys: see `short`


@dataclass(frozen=True, eq=False)
class Setting:
    """Evaluations that differ in their seed alone.

    Attributes:
        name: Its name in the report, unique.
        runs: One evaluation per seed, of the same entries.
    """

    name: str
    runs: tuple[Evaluation, ...]

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """The seed of each run."""
        return tuple(run.settings.get("seed") for run in self.runs)

    @property
    def trained(self) -> bool:
        """Whether there is a training run behind it."""
        return self.runs[0].run is not None

    def values(self, metric: str, places: Sequence[int] | None = None) -> np.ndarray:
        """(k, n) float64 of the entries at these places (None: of all), NaN where there is no score."""
        values = np.stack([run.values[metric] for run in self.runs])
        return values if places is None else values[:, places]

    def mean(self, metric: str, places: Sequence[int] | None = None) -> tuple[float, float, float] | None:
        """Mean and 95% interval over the entries that have a value in every run; None if there are none.

        Args:
            metric: A name in `METRICS`.
            places: The entries to look at; None: all.
        """
        values = self.values(metric, places)
        values = values[:, ~np.isnan(values).any(axis=0)]
        return (float(values.mean()), *bootstrap_interval(values)) if values.size else None


def group(evaluations: Sequence[Evaluation]) -> list[Setting]:
    """Group evaluations that differ in their seed alone, and give the groups unique names.

    An evaluation that stands alone keeps its name; the others are named by the values in which they differ.
    """
    keys = differing([run for run in evaluations if not run.alone])
    groups: dict[Any, list[Evaluation]] = defaultdict(list)
    for number, run in enumerate(evaluations):
        decisive = {key: value for key, value in run.settings.items() if key != "seed"}
        key = number if run.alone else (json.dumps(decisive, sort_keys=True), tuple(run.examples))
        groups[key].append(run)
    apart: list[list[Evaluation]] = []
    for runs in groups.values():
        distinct = len({run.settings.get("seed") for run in runs}) == len(runs)
        apart += [runs] if distinct else [[run] for run in runs]
    settings = []
    for members, name in zip(apart, _unique([_name(members, keys) for members in apart], apart), strict=True):
        suffix = ", seed {}" if len(members) > 1 else ""
        named = (replace(run, name=name + suffix.format(run.settings.get("seed"))) for run in members)
        settings.append(Setting(name, tuple(named)))
    return settings


def differing(evaluations: Sequence[Evaluation]) -> list[str]:
    """Keys whose values differ among the evaluations that have them, without keys that follow from a name.

    `model.n_layer` follows from `model.name` if all evaluations with the same model have the same number of layers.
    """
    values: dict[str, dict[int, str]] = defaultdict(dict)  # key → number of the evaluation → value as JSON
    for number, run in enumerate(evaluations):
        for key, value in run.settings.items():
            if key != "checkpoint" or value is not None:  # an untuned model has none
                values[key][number] = json.dumps(value, sort_keys=True)
    found = [key for key, by_run in values.items() if len(set(by_run.values())) > 1]

    def follows(key: str) -> bool:
        prefix, _, last = key.rpartition(".")
        owner = next((f"{prefix}.{name}" for name in _NAMES if f"{prefix}.{name}" in found), None)
        if owner is None or last in _NAMES:
            return False
        pairs = {(values[owner].get(number), value) for number, value in values[key].items()}
        return len(pairs) == len({name for name, _ in pairs})

    return [key for key in found if not follows(key)]


def short(key: str) -> str:
    """`optimizer.lr` → `lr`, `model.name` → `model`."""
    first, _, last = key.rpartition(".")
    return first if last in _NAMES else last


def words(key: str) -> str:
    """The name of a key in names of settings: `prompt weight`, else as `short` has it."""
    return _WORDS.get(key, short(key))


def value_text(value: Any) -> str:
    """A configuration value as the user types it on the command line: `0.25`, `5e-4`, `true`."""
    if isinstance(value, float) and (0 < abs(value) < 1e-3 or "e" in f"{value:g}"):
        digits, power = f"{value:e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":")).replace('"', "")


def _name(members: Sequence[Evaluation], keys: Sequence[str]) -> str:
    first = members[0]
    shown = [key for key in keys if key in first.settings and (key != "seed" or len(members) == 1)]
    if first.alone or first.run is None or not shown:
        return first.name
    return _values_text(first, shown)


def _unique(names: Sequence[str], groups: Sequence[Sequence[Evaluation]]) -> list[str]:
    """The names; equal ones followed by what differs among their groups, or else by a number."""
    alike: dict[str, list[Evaluation]] = defaultdict(list)
    for name, members in zip(names, groups, strict=True):
        alike[name].append(members[0])
    unique, taken = [], Counter[str]()
    for name, members in zip(names, groups, strict=True):
        keys = [key for key in differing(alike[name]) if key in members[0].settings]
        keys = [key for key in keys if key != "seed" or len(members) == 1]
        name = ", ".join(filter(None, [name, _values_text(members[0], keys)]))
        taken[name] += 1
        unique.append(name if taken[name] == 1 else f"{name} ({taken[name]})")
    return unique


def _values_text(run: Evaluation, keys: Sequence[str]) -> str:
    values = {key: value_text(run.settings[key]) for key in keys}
    if "lora.rank" in values and run.settings["lora.rank"] == 0:
        values = {"": "full fine-tuning"} | {key: text for key, text in values.items() if not key.startswith("lora.")}
    return ", ".join(f"{words(key)}={text}" if key else text for key, text in values.items())
