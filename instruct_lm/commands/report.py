"""Evaluations in words and side by side: `python -m instruct_lm.report --help`."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instruct_lm.errors import InputError

if TYPE_CHECKING:
    from instruct_lm.report.comparison import Comparison
    from instruct_lm.report.side_by_side import Entry

N_SHOWN = 5  # entries with their answers in the terminal
N_WRITTEN = 20  # and in Markdown
MAX_TEXT = 400  # characters of a text in the terminal


def describe_summary(summary: Mapping[str, Any]) -> str:
    """An evaluation in a few lines."""
    n = summary["n"]
    lines = [
        f"{n} answers: exact match {round(summary['exact_match'] * n)} of {n}, chrF {summary['chrf']:.1f}, "
        f"ROUGE-L {summary['rouge_l']:.1f}"
    ]
    if "ended" in summary:
        lines.append(f"answers ended by the model: {summary['ended']:.0%}, {summary['mean_tokens']:.1f} tokens each")
    if summary["mean"] is not None:
        low, high = summary["ci95"]
        kind = summary["judge"]["kind"]
        lines.append(f"score ({kind}): {summary['mean']:.1f} of 100, 95% interval {low:.1f} to {high:.1f}")
    if summary["failed"]:
        first = summary["failures"][0]
        lines.append(
            f"{summary['failed']} entries have no score, the first: entry {first['index']}, {first['reason']}. "
            f"Mean with those as 0: {summary['mean_failed_as_zero']:.1f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare what the arguments name; returns 2 after a message on stderr for bad input."""
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without − or an answer's letters
    try:
        _report(options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # piped into head
        sys.stderr.close()
        return 1
    return 0


def _report(options: argparse.Namespace) -> None:
    from instruct_lm.report.comparison import compare
    from instruct_lm.report.evaluations import collect
    from instruct_lm.report.page import picture, render
    from instruct_lm.report.side_by_side import evenly, side_by_side

    evaluations, waiting = collect(options.runs)
    comparison = compare(evaluations, options.baseline)
    if waiting:
        commands = "\n".join(f"  python evaluate.py run={run}" for run in waiting)
        print(f"Left out, since they are not evaluated yet:\n{commands}", file=sys.stderr)
    print(terminal(comparison, evenly(side_by_side(comparison), N_SHOWN), shutil.get_terminal_size().columns))

    title = options.title or _title(comparison)
    if options.html:
        _write(render(comparison, title), options.html)
    if options.md:
        _write(markdown_report(comparison, title), options.md)
    if options.svg:
        _write(picture(comparison), options.svg)


def _write(content: str, path: Path) -> None:
    from instruct_lm.io.files import write_text

    try:
        write_text(content, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}. Choose another file.") from error
    print(f"Written: {path}")


def terminal(comparison: Comparison, entries: Sequence[Entry], width: int) -> str:
    """Tables, sentences and a few answers as plain text.

    Args:
        comparison: What to tell.
        entries: Those to show.
        width: Columns of the terminal, for the answers; tables have their own width.
    """
    from instruct_lm.report.tables import all_tables, markdown, sentences

    parts = [f"{table.title}\n\n{markdown(table)}\n" for table in all_tables(comparison)]
    parts.append("\n".join(textwrap.fill(sentence, width) for sentence in sentences(comparison)) + "\n")
    parts.append(f"{len(entries)} entries from all over the set")
    for entry in entries:
        question = " ".join(filter(None, [entry.instruction, entry.input]))
        lines = [("", question), ("reference", entry.reference)]
        for answer in entry.answers:
            lines.append((f"{answer.by} [{answer.scores_text}]", answer.text))
        parts.append("\n".join([f"\nEntry {entry.number}", *(_wrapped(name, text, width) for name, text in lines)]))
    return "\n".join(parts)


def markdown_report(comparison: Comparison, title: str) -> str:
    """All tables, the sentences and the answers of largest disagreement in Markdown."""
    from instruct_lm.report.side_by_side import by_disagreement, side_by_side
    from instruct_lm.report.tables import all_tables, markdown, markdown_text, sentences

    parts = [f"# {markdown_text(title)}", "\n".join(f"- {markdown_text(text)}" for text in sentences(comparison))]
    for table in all_tables(comparison):
        parts += [f"## {markdown_text(table.title)}", markdown(table), *([table.note] if table.note else [])]
    entries = side_by_side(comparison)
    parts.append(
        f"## Answers\n\nThe {min(N_WRITTEN, len(entries))} of {len(entries)} entries with the largest disagreement."
    )
    for entry in by_disagreement(entries)[:N_WRITTEN]:
        parts.append(f"### Entry {entry.number}\n\n{markdown_text(entry.instruction)}")
        parts += [markdown_text(entry.input)] if entry.input else []
        lines = [f"- reference: {markdown_text(entry.reference)}"]
        for answer in entry.answers:
            lines.append(f"- {markdown_text(answer.by)} [{answer.scores_text}]: {markdown_text(answer.text)}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _wrapped(name: str, text: str, width: int) -> str:
    """A named text with a hanging indent; control characters, which a terminal would obey, are spelled out."""
    text = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} …"
    text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text.replace("\t", " "))
    lines = (f"{name}: {text}" if name else text).split("\n")
    wrap = textwrap.TextWrapper(max(width, 40), initial_indent="  ", subsequent_indent="    ")
    return "\n".join(wrap.fill(line) for line in lines)


def _title(comparison: Comparison) -> str:
    names = [setting.name for setting in comparison.settings]
    if len(names) > 3:
        return f"{len(names)} settings compared"
    return f"{names[0]} evaluated" if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]} compared"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m instruct_lm.report",
        description="Compare evaluations: tables, paired differences and a few answers; also as a page.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m instruct_lm.report untuned=outputs/a tuned=outputs/b --html a.html",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]RUN",
        help="a run whose test split was evaluated, an evaluation's own folder, or a multirun with all its runs, "
        "of which those that differ in the seed alone are put together",
    )
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="NAME",
        help="what the others are held against; may be given again (default: the first, and the first trained one)",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page")
    parser.add_argument("--md", type=Path, metavar="FILE", help="write the tables and answers as Markdown")
    parser.add_argument(
        "--svg", type=Path, metavar="FILE", help="write a picture of the mean scores and the differences"
    )
    parser.add_argument("--title", metavar="TEXT", help="title of page and Markdown")
    return parser


if __name__ == "__main__":
    sys.exit(main())
