"""The tables of a comparison, as texts: the same for the terminal, Markdown and HTML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from instruct_lm.evaluation.statistics import Difference, interval
from instruct_lm.report.comparison import Comparison, p_text, signed
from instruct_lm.report.evaluations import Evaluation
from instruct_lm.report.settings import Setting, short, value_text

NONE = "–"
LABELS = {"score": "score", "chrf": "chrF"}  # what a comparison's headline is called


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
        """The columns in which some row has something."""
        return [name for name in self.rows[0] if any(row[name] != NONE for row in self.rows)] if self.rows else []

    @property
    def cells(self) -> list[list[str]]:
        """The texts below the header, row by row."""
        return [[row[name] for name in self.header] for row in self.rows]


def all_tables(comparison: Comparison) -> list[Table]:
    """The tables that have something to say, the scores first."""
    tables = [
        scores_table(comparison),
        *differences_tables(comparison),
        seen_table(comparison),
        settings_table(comparison),
        runs_table(comparison),
        agreement_table(comparison),
    ]
    return [table for table in tables if len(table.header) > 1]


def scores_table(comparison: Comparison) -> Table:
    """A row a setting: means with their intervals."""
    rows = []
    for setting in comparison.settings:
        means, n = setting.means, len(setting.runs[0].entries)
        failed = sum(run.summary["failed"] for run in setting.runs)
        row = {
            "setting": setting.name,
            "score": interval_text(means.get("score")),
            "exact match": interval_text(means["exact_match"], n, f" of {n}"),
            "chrF": interval_text(means["chrf"]),
            "ROUGE-L": interval_text(means["rouge_l"]),
            "ended": _average(setting, "ended", "{:.0%}"),
            "tokens": _average(setting, "mean_tokens", "{:.1f}"),
            "seeds": _seeds(setting) if len(setting.runs) > 1 else NONE,
            "without a score": str(failed) if failed else NONE,
        }
        rows.append(row)
    note = "Mean [95% interval]. Ended: answers that the model ended itself; tokens: mean length of an answer."
    if comparison.headline == "score":
        note += f" Score: 0 to 100, judge: {'; '.join(sorted({_judge(run) for run in comparison.runs}))}."
    return Table("Scores", rows, note)


def differences_tables(comparison: Comparison) -> list[Table]:
    """A table a baseline: what each setting has more than it, over the same entries."""
    tables = []
    for baseline, contrasts in comparison.paired.items():
        rows = []
        for contrast in contrasts:
            found, n = contrast.differences, len(contrast.setting.runs[0].entries)
            needed = found[contrast.metric].entries_needed
            row = {
                "setting": contrast.setting.name,
                "score": difference_text(found.get("score")),
                "exact match, entries": difference_text(found["exact_match"], n),
                "chrF": difference_text(found["chrf"]),
                "ROUGE-L": difference_text(found["rouge_l"]),
                "p": p_text(contrast.p_value).removeprefix("p ").removeprefix("= "),
                "entries needed": NONE if needed is None else f"{needed:,}",
            }
            rows.append(row)
        note = (
            "Mean difference [95% interval] over the same entries. p: of the score (of chrF without one), adjusted "
            "for the number of rows (Holm). Entries needed: to show the difference seen at the 5% level, power 80%."
        )
        tables.append(Table(differences_title(baseline), rows, note))
    return tables


def differences_title(baseline: str) -> str:
    """The title of a baseline's table, and of the chart beside it."""
    return f"Differences from {baseline}"


def seen_table(comparison: Comparison) -> Table:
    """Scores of the test entries that stand in the training split too, apart from the others."""
    metric = comparison.headline
    name = LABELS[metric]
    rows = []
    for setting in comparison.settings:
        if not setting.runs[0].seen:
            continue
        values = setting.values(metric)
        seen = np.isin(np.arange(values.shape[1]), setting.runs[0].seen)
        scored = ~np.isnan(values).any(axis=0)
        row = {
            "setting": setting.name,
            "in training too": str(seen.sum()),
            f"{name} of these": _part(values[:, seen & scored]),
            f"{name} of the others": _part(values[:, ~seen & scored]),
        }
        rows.append(row)
    note = "Same instruction and input, without case and spacing. For an untuned model: those that training would show."
    return Table("Test entries that stand in training too", rows, note)


def seen_sentence(comparison: Comparison) -> str:
    """One line on what `seen_table` shows."""
    seen = [setting.runs[0].seen for setting in comparison.settings]
    unknown = [setting.name for setting, found in zip(comparison.settings, seen, strict=True) if found is None]
    most = max((len(found) for found in seen if found is not None), default=0)
    if len(unknown) == len(seen):
        return "Whether test entries stand in the training split too is unknown: the data file is not at hand."
    n = f"{most} test entries stand" if most != 1 else "1 test entry stands"
    apart = ": scores of these and of the others are given apart." if most else " (same instruction and input)."
    rest = f" Unknown, since the data file is not at hand: {', '.join(unknown)}." if unknown else ""
    return f"{n if most else 'No test entry stands'} in the training split too{apart}{rest}"


def settings_table(comparison: Comparison) -> Table:
    """The configuration keys whose values differ."""
    rows = []
    for setting in comparison.settings:
        values = setting.runs[0].settings
        row = {"setting": setting.name}
        row |= {short(key): value_text(values[key]) if key in values else NONE for key in comparison.keys}
        if "seed" in comparison.keys:
            row["seed"] = _seeds(setting)
        rows.append(row)
    return Table("Settings that differ", rows)


def runs_table(comparison: Comparison) -> Table:
    """A row a training run: losses before and after, and what it cost."""
    rows = []
    for run in comparison.runs:
        training, scores = run.training, run.values["score"][~np.isnan(run.values["score"])]
        if not training:
            continue
        seconds = training.get("train_seconds")
        row = {
            "run": run.name,
            "score": f"{scores.mean():.1f}" if scores.size else NONE,
            "validation loss": _change(training, "val/loss"),
            "of the responses": _change(training, "val/response_loss"),
            "steps": _plain(training.get("steps"), "{:,}"),
            "minutes": _plain(seconds and seconds / 60, "{:.1f}"),
            "tokens/s": _plain(training.get("tokens_per_second"), "{:,.0f}"),
            "peak GB": _plain(training.get("peak_memory_gb"), "{:.2f}"),
        }
        rows.append(row)
    note = (
        "Losses per token before → after training; the validation loss has the run's own weights, the loss of the "
        "responses is the same measure for all. Minutes: of training steps alone."
    )
    return Table("Training runs", rows, note)


def agreement_table(comparison: Comparison) -> Table:
    """Judges that scored the same answers."""
    rows = []
    for first, second, n, found in comparison.agreements:
        coefficients = {name.title(): _plain(value, "{:.2f}") for name, value in found.items()}
        rows.append({"judges": f"{first} and {second}", "entries": str(n), **coefficients})
    return Table("Agreement of judges on the same answers", rows)


def sentences(comparison: Comparison) -> list[str]:
    """What the comparison shows, a sentence a contrast."""
    return [*(contrast.sentence for contrast in comparison.contrasts), seen_sentence(comparison)]


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
    if unit and mean == round(mean):  # a count
        return f"{mean:.0f}{unit} [{low:.0f}, {high:.0f}]"
    return f"{mean:.1f}{unit} [{low:.1f}, {high:.1f}]"


def difference_text(found: Difference | None, scale: float = 1) -> str:
    """`+1.8 [−0.2, +3.9]`; a dash for None."""
    if found is None:
        return NONE
    return f"{signed(scale * found.mean)} [{signed(scale * found.low)}, {signed(scale * found.high)}]"


def _judge(run: Evaluation) -> str:
    judge = run.summary["judge"]
    return f"{judge['kind']} {judge['model']}" if judge.get("model") else str(judge["kind"])


def _seeds(setting: Setting) -> str:
    return ", ".join(map(str, setting.seeds))


def _part(values: np.ndarray) -> str:
    return interval_text((float(values.mean()), *interval(values))) if values.size else NONE


def _average(setting: Setting, key: str, form: str) -> str:
    values = [run.summary[key] for run in setting.runs if key in run.summary]
    return form.format(np.mean(values)) if values else NONE


def _change(training: Mapping[str, Any], name: str) -> str:
    before, after = (training.get(when, {}).get(name) for when in ("before", "after"))
    return NONE if before is None or after is None else f"{before:.3f} → {after:.3f}"


def _plain(value: float | None, form: str) -> str:
    return NONE if value is None else form.format(value)
