"""The tables of a comparison as texts: the same for the terminal, Markdown and HTML."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from instruct_lm.evaluation.statistics import Difference, agreement
from instruct_lm.report.comparison import Comparison, count_text, p_text, signed
from instruct_lm.report.findings import judge_text
from instruct_lm.report.settings import Setting, short, value_text

NONE = "–"
LABELS = {"score": "score", "exact_match": "exact match", "chrf": "chrF", "rouge_l": "ROUGE-L"}  # of the metrics
_DIFFERENCES_NOTE = (
    "Mean difference [95% interval] over the same entries. p: of the score (of chrF without one), adjusted for the "
    "number of rows (Holm). Entries needed: to show the difference seen at the 5% level, power 80%."
)
_LENGTHS_NOTE = (
    "Mean [95% interval]. Ratio: characters of the reference per character of the prompt's texts, as they stand in "
    "responses.json (instruction, input, system and history, without the prompt's template). The entries are sorted "
    "by it and cut in three."
)
_THIRDS_NOTE = "Mean difference [95% interval] over the same entries; p adjusted for all cells of this table (Holm)."
_SEEN_NOTE = "Same prompt, ignoring case and spacing; for an untuned model, by its configuration."
_UNFINISHED_NOTE = "No other table counts them. The multirun's command, given again, does them and keeps the rest."
_RUNS_NOTE = (
    "Losses per token, before → after training. The validation loss uses the run's own token weights; the response "
    "loss is the same measure for all runs. Minutes: of the training steps alone."
)


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows.

    Attributes:
        title: What it shows.
        rows: Column name → text, the same columns in each row.
        note: How to read it.
    """

    title: str
    rows: Sequence[Mapping[str, str]]
    note: str = ""

    @property
    def header(self) -> list[str]:
        """The columns in which some row has a value."""
        return [name for name in self.rows[0] if any(row[name] != NONE for row in self.rows)] if self.rows else []

    @property
    def cells(self) -> list[list[str]]:
        """The texts below the header, row by row."""
        return [[row[name] for name in self.header] for row in self.rows]


def all_tables(comparison: Comparison) -> list[Table]:
    """The tables that have a column besides the names, the scores first."""
    first = [
        scores_table(comparison),
        unfinished_table(comparison),
        *differences_tables(comparison),
        *lengths_tables(comparison),
        seen_table(comparison),
    ]
    tables = [*first, settings_table(comparison), runs_table(comparison), agreement_table(comparison)]
    return [table for table in tables if len(table.header) > 1]


def scores_table(comparison: Comparison) -> Table:
    """A row per setting: means with their intervals."""
    rows = []
    for setting in comparison.settings:
        n = len(setting.runs[0].examples)
        failed = sum(run.summary["failed"] for run in setting.runs)
        row = {"setting": setting.name}
        for metric, label in LABELS.items():
            unit = (n, f" of {n}") if metric == "exact_match" else (1, "")
            row[label] = interval_text(setting.mean(metric), *unit)
        row |= {"ended": _average(setting, "ended", "{:.0%}"), "tokens": _average(setting, "mean_tokens", "{:.1f}")}
        row["seeds"] = _seeds(setting) if len(setting.runs) > 1 else NONE
        row["without a score"] = str(failed) if failed else NONE
        rows.append(row)
    note = "Mean [95% interval]. Ended: answers that the model ended itself; tokens: mean length of an answer."
    if comparison.headline == "score":
        note += f" Score: 0 to 100, judge: {'; '.join(sorted({judge_text(run) for run in comparison.runs}))}."
    return Table("Scores", rows, note)


def unfinished_table(comparison: Comparison) -> Table:
    """The jobs of a multirun that failed, were stopped or have not begun."""
    rows = [
        {"job": job.name, "what happened": job.words, "message": job.message or NONE} for job in comparison.unfinished
    ]
    return Table("Jobs that are not complete", rows, _UNFINISHED_NOTE)


def differences_tables(comparison: Comparison) -> list[Table]:
    """A table per baseline: each setting minus it, over the same entries."""
    tables = []
    for baseline, contrasts in comparison.paired.items():
        rows = []
        for contrast in contrasts:
            row = {"setting": contrast.setting.name}
            for metric, label in (LABELS | {"exact_match": "exact match, entries"}).items():
                scale = len(contrast.setting.runs[0].examples) if metric == "exact_match" else 1
                row[label] = difference_text(contrast.differences.get(metric), scale)
                if metric == "score":
                    row["p"] = p_text(contrast.p_value).removeprefix("p ").removeprefix("= ")
            needed = contrast.found.entries_needed
            rows.append(row | {"entries needed": NONE if needed is None else count_text(needed)})
        tables.append(Table(f"Differences from {baseline}", rows, _DIFFERENCES_NOTE))
    return tables


def lengths_tables(comparison: Comparison) -> list[Table]:
    """Means of the settings in question, and their differences, in each third of the entries by length ratio."""
    if not (thirds := comparison.thirds):
        return []
    metric = "score" if all(contrast.metric == "score" for contrast in comparison.question) else "chrf"
    columns = {f"{third.name.removeprefix('ratio ')} (n = {len(third.places)})": third for third in thirds}
    baseline = comparison.question[0].baseline
    means = [
        {"setting": setting.name}
        | {name: interval_text(setting.mean(metric, third.places)) for name, third in columns.items()}
        for setting in (baseline, *(contrast.setting for contrast in comparison.question))
    ]
    differences = []
    for i, contrast in enumerate(comparison.question):
        row = {"setting": contrast.setting.name}
        for name, third in columns.items():
            found = third.contrasts[i]
            text = difference_text(found.differences.get(metric))
            row[name] = text if text == NONE or found.metric != metric else f"{text}, {p_text(found.p_value)}"
        differences.append(row)
    label = LABELS[metric]
    return [
        Table(f"{label[0].upper()}{label[1:]} by length of response to prompt", means, _LENGTHS_NOTE),
        Table(thirds_title(comparison), differences, _THIRDS_NOTE),
    ]


def thirds_title(comparison: Comparison) -> str:
    """Of the table of differences in each third of the entries; empty without one."""
    if not comparison.thirds:
        return ""
    return f"Differences from {comparison.question[0].baseline.name} by length of response to prompt"


def seen_table(comparison: Comparison) -> Table:
    """Scores of the test entries that are also in the training split, apart from the others."""
    metric, rows = comparison.headline, []
    for setting in comparison.settings:
        if not (seen := setting.runs[0].seen):
            continue
        others = [place for place in range(len(setting.runs[0].examples)) if place not in seen]
        row = {"setting": setting.name, "also in training": str(len(seen))}
        row[f"{LABELS[metric]} of these"] = interval_text(setting.mean(metric, seen))
        row[f"{LABELS[metric]} of the others"] = interval_text(setting.mean(metric, others))
        rows.append(row)
    return Table("Test entries that are also in the training split", rows, _SEEN_NOTE)


def seen_sentence(comparison: Comparison) -> str:
    """One line on what `seen_table` shows."""
    seen = {setting.name: setting.runs[0].seen for setting in comparison.settings}
    known = [len(places) for places in seen.values() if places is not None]
    unknown = ", ".join(name for name, places in seen.items() if places is None)
    parts = [f"{max(known)} (same prompt)"] if known else []
    parts += [f"unknown for {unknown}, whose data file is not on this machine"] if unknown else []
    return f"Test entries that are also in the training split: {'; '.join(parts)}."


def settings_table(comparison: Comparison) -> Table:
    """The configuration keys whose values differ."""
    rows = []
    for setting in comparison.settings:
        values, row = setting.runs[0].settings, {"setting": setting.name}
        for key in comparison.keys:
            row[short(key)] = value_text(values[key]) if key in values else NONE
        rows.append(row | ({"seed": _seeds(setting)} if "seed" in comparison.keys else {}))
    return Table("Settings that differ", rows)


def runs_table(comparison: Comparison) -> Table:
    """A row per training run: losses before and after, and its cost."""
    rows = []
    for run in comparison.runs:
        training, scores = run.training, run.values["score"][~np.isnan(run.values["score"])]
        if not training:
            continue
        row = {"run": run.name, "score": _formatted(scores.mean() if scores.size else None, "{:.1f}")}
        for label, loss in (("validation loss", "val/loss"), ("response loss", "val/response_loss")):
            before, after = (training.get(when, {}).get(loss) for when in ("before", "after"))
            row[label] = NONE if before is None or after is None else f"{before:.3f} → {after:.3f}"
        seconds = training.get("train_seconds")
        row["steps"] = _formatted(training.get("steps"), "{:,}")
        row["minutes"] = _formatted(seconds and seconds / 60, "{:.1f}")
        row["tokens/s"] = _formatted(training.get("tokens_per_second"), "{:,.0f}")
        row["peak GB"] = _formatted(training.get("peak_memory_gb"), "{:.2f}")
        rows.append(row)
    return Table("Training runs", rows, _RUNS_NOTE)


def agreement_table(comparison: Comparison) -> Table:
    """Judges that scored the same answers."""
    rows = []
    for first, second in combinations(comparison.runs, 2):
        same = first.examples == second.examples and first.answers == second.answers
        if not same or first.summary["judge"] == second.summary["judge"]:
            continue
        scores = np.stack([first.values["score"], second.values["score"]])
        scores = scores[:, ~np.isnan(scores).any(axis=0)]
        if (n := scores.shape[1]) > 1:
            row = {"judges": f"{first.name} and {second.name}", "entries": str(n)}
            found = agreement(*scores.tolist())
            rows.append(row | {name.title(): _formatted(value, "{:.2f}") for name, value in found.items()})
    return Table("Agreement of judges on the same answers", rows)


def markdown(table: Table) -> str:
    """The table in Markdown, aligned for a terminal, without title and note."""
    cells = [[markdown_text(cell) for cell in row] for row in [table.header, *table.cells]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    padded = ((cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def markdown_text(text: str) -> str:
    """A text as Markdown that shows every character as it is, in one line."""
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text)
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
    text = re.sub(r"[\\`*|~]|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)
    return re.sub(r"\s*\n\s*", "<br>", text.strip())


def interval_text(found: tuple[float, float, float] | None, scale: float = 1, unit: str = "") -> str:
    """`42.6 [36.4, 49.0]`, `25.7 of 110 [17.3, 34.4]`, `24 of 110 [16, 33]`; a dash for None."""
    if found is None:
        return NONE
    mean, low, high = (scale * value for value in found)
    digits = 0 if unit and mean == round(mean) else 1  # 0: a count
    return f"{mean:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"


def difference_text(found: Difference | None, scale: float = 1) -> str:
    """`+1.8 [−0.2, +3.9]`; a dash for None."""
    if found is None:
        return NONE
    return f"{signed(scale * found.mean)} [{signed(scale * found.low)}, {signed(scale * found.high)}]"


def _seeds(setting: Setting) -> str:
    return ", ".join(NONE if seed is None else str(seed) for seed in setting.seeds)


def _average(setting: Setting, key: str, form: str) -> str:
    values = [run.summary[key] for run in setting.runs if key in run.summary]
    return _formatted(np.mean(values) if values else None, form)


def _formatted(value: Any, form: str) -> str:
    return NONE if value is None else form.format(value)
