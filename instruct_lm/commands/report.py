"""Compare evaluations: tables, paired differences and a few answers; also as a page."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from instruct_lm.commands.exit_status import VERSION, exit_status
from instruct_lm.commands.own_files import check_output_file
from instruct_lm.commands.pasting import command
from instruct_lm.errors import InputError, visible
from instruct_lm.io.files import write_text
from instruct_lm.io.run_files import JOBS
from instruct_lm.io.sweep_files import unfinished_jobs


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the evaluations named on the command line; returns the exit status."""
    return exit_status(partial(write_report, **vars(_parser().parse_args(arguments))))


def write_report(
    runs: Sequence[str],
    html: Path | None = None,
    md: Path | None = None,
    svg: Path | None = None,
    baselines: Sequence[str] = (),
    title: str = "",
) -> None:
    """Compare evaluations: print tables, findings and a few answers, and write files.

    Args:
        runs: `PATH` or `NAME=PATH`, as `instruct_lm.report.evaluations.collect` takes them.
        html: File for the self-contained page.
        md: File for tables and answers as Markdown.
        svg: File for the chart of mean scores and differences.
        baselines: Names of the settings that the others are compared with; none: see `compare`.
        title: Of page and Markdown; empty: made from model, data and settings.

    Raises:
        InputError: A run is missing, damaged or not evaluated, a baseline is unknown, or a file cannot be written.
    """
    from instruct_lm.report import findings
    from instruct_lm.report.comparison import compare
    from instruct_lm.report.evaluations import NotEvaluatedError, collect
    from instruct_lm.report.text import markdown_report, terminal

    for option, file in {"--html": html, "--md": md, "--svg": svg}.items():
        if file is not None:
            check_output_file(file, option)
    try:
        evaluations, waiting = collect(runs)
    except NotEvaluatedError as error:
        way = command("evaluate.py", run=error.run)
        raise InputError(f"{error.folder} holds no evaluation. Make one: {way}") from error
    unfinished = [job for run in runs if Path(run, JOBS).is_file() for job in unfinished_jobs(Path(run))]
    comparison = compare(evaluations, baselines, unfinished)
    if waiting:
        commands = "\n".join(f"  {command('evaluate.py', run=run)}" for run in waiting)
        print(visible(f"Left out, since they are not evaluated yet:\n{commands}"), file=sys.stderr)
    width = shutil.get_terminal_size().columns
    table_width = width if sys.stdout.isatty() else sys.maxsize  # a file keeps all columns
    print(visible(terminal(comparison, width, table_width)))
    title = title or findings.title(comparison)
    if html or svg:
        from instruct_lm.report import page  # imports Matplotlib
    if html:
        _write(page.render(comparison, title), html)
    if md:
        _write(markdown_report(comparison, title), md)
    if svg:
        _write(page.picture(comparison), svg)


def _write(content: str, path: Path) -> None:
    try:
        write_text(content.encode("utf-8", "replace").decode(), path)  # an answer may hold half a surrogate pair
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}. Choose another file.") from error
    print(f"Written: {path}")


def _parser() -> argparse.ArgumentParser:
    example = "Example: python -m instruct_lm.report untuned=outputs/a tuned=outputs/b --html a.html"
    parser = argparse.ArgumentParser("python -m instruct_lm.report", description=__doc__, epilog=example)
    runs = (
        "a run whose test split was evaluated, an evaluation's own folder, or a multirun with all its runs, of which "
        "those that differ in the seed alone are grouped, and its untuned models"
    )
    parser.add_argument("--version", action="version", version=VERSION)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help=runs)
    baseline = "compare the others with this one; may be repeated (default: the first, and the first trained one)"
    parser.add_argument("--baseline", dest="baselines", action="append", default=[], metavar="NAME", help=baseline)
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page")
    parser.add_argument("--md", type=Path, metavar="FILE", help="write the tables and answers as Markdown")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write a chart of mean scores and differences")
    parser.add_argument("--title", default="", metavar="TEXT", help="title of page and Markdown")
    return parser
