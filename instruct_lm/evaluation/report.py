"""Evaluations in words and side by side: `python -m instruct_lm.evaluation.report FOLDER…` prints a table."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from instruct_lm.errors import InputError


def describe_summary(summary: Mapping[str, Any]) -> str:
    """An evaluation in a few lines."""
    lines = [
        f"{summary['n']} answers: exact match {_exact(summary)} of {summary['n']}, chrF {summary['chrf']:.1f}, "
        f"ROUGE-L {summary['rouge_l']:.1f}"
    ]
    if "ended" in summary:
        lines.append(f"answers ended by the model: {summary['ended']:.0%}, {summary['mean_tokens']:.1f} tokens each")
    if summary["mean"] is not None:
        low, high = summary["ci95"]
        lines.append(f"score ({summary['judge']['kind']}): {summary['mean']:.1f} of 100, 95% interval {low:.1f} to {high:.1f}")
    if summary["failed"]:
        first = summary["failures"][0]
        lines.append(
            f"{summary['failed']} entries have no score, the first: entry {first['index']}, {first['reason']}. "
            f"Mean with those as 0: {summary['mean_failed_as_zero']:.1f}"
        )
    return "\n".join(lines)


def _exact(summary: Mapping[str, Any]) -> int:
    return round(summary["exact_match"] * summary["n"])


def find_summary(folder: Path) -> dict[str, Any]:
    """The summary of an evaluation's folder, or of a run's evaluation of its test split.

    Raises:
        InputError: there is none.
    """
    for path in (folder / "evaluation" / "test" / "summary.json", folder / "summary.json"):
        if path.is_file() and "exact_match" in (summary := json.loads(path.read_text(encoding="utf-8"))):
            return summary
    raise InputError(f"{folder} holds no evaluation: run python evaluate.py run={folder} first")


def markdown_table(names: Sequence[str], summaries: Sequence[Mapping[str, Any]]) -> str:
    """A row for each evaluation."""
    rows = ["| | exact match | chrF | ROUGE-L | ended by the model | score, 95% interval |", "|---|---|---|---|---|---|"]
    for name, summary in zip(names, summaries, strict=True):
        ended = f"{summary['ended']:.0%}" if "ended" in summary else "–"
        score = "–"
        if summary["mean"] is not None:
            score = f"{summary['mean']:.1f} [{summary['ci95'][0]:.1f}, {summary['ci95'][1]:.1f}] ({summary['judge']['kind']})"
        cells = [name, f"{_exact(summary)} of {summary['n']}", f"{summary['chrf']:.1f}", f"{summary['rouge_l']:.1f}", ended, score]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main(arguments: Sequence[str]) -> int:
    """Print the table of the folders given, each as PATH or NAME=PATH."""
    if not arguments or "-h" in arguments or "--help" in arguments:
        print("usage: python -m instruct_lm.evaluation.report [NAME=]FOLDER …\nA table of evaluations or evaluated runs.")
        return 0 if arguments else 2
    named = [argument.rpartition("=")[::2] for argument in arguments]
    try:
        summaries = [find_summary(Path(folder)) for _, folder in named]
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(markdown_table([name or Path(folder).name for name, folder in named], summaries))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
