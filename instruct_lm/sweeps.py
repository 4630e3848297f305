"""What follows training with `evaluate=true`: the run's answers and scores and, after a multirun, the comparison."""

from __future__ import annotations

import gc
import logging
import shlex
import subprocess
import sys
from pathlib import Path

from instruct_lm.errors import RunError
from instruct_lm.files import shown
from instruct_lm.memory import give_back_freed_memory
from instruct_lm.runs import BEST, CONFIG_FILE, SUMMARY, UNTUNED

log = logging.getLogger(__name__)

COMMAND = Path(__file__).resolve().parents[1] / "evaluate.py"


def evaluate_run(run: Path, checkpoint: str = "best") -> Path:
    """Call `evaluate.py run=… checkpoint=…` in a process of its own, unless that was done.

    Args:
        run: The folder of a complete run.
        checkpoint: `best` or `untuned`.

    Returns:
        The evaluation's folder.

    Raises:
        RunError: The evaluation failed; it has said why.
    """
    folder = run / "evaluation" / ("test" if checkpoint == "best" else f"test-{checkpoint}")
    done, weights = folder / SUMMARY, run / BEST
    if done.is_file() and (checkpoint != "best" or done.stat().st_mtime >= weights.stat().st_mtime):
        return folder
    gc.collect()
    give_back_freed_memory()
    arguments = [f"run={_quoted(run)}", f"checkpoint={checkpoint}"]
    log.info("evaluating: python evaluate.py %s", shlex.join([f"run={shown(run)}", arguments[1]]))
    status = subprocess.run([sys.executable, str(COMMAND), *arguments], check=False).returncode
    if status:
        raise RunError(
            f"The evaluation of {shown(run)} ended with status {status}. The same command goes on from here."
        )
    return folder


def compare_runs(sweep: Path) -> Path:
    """Evaluate the untuned model of a sweep's first run, hold all runs against it and return the page.

    Raises:
        RunError: An evaluation or the report failed; it has said why.
    """
    from instruct_lm.evaluation import report

    first = min(path.parents[1] for path in sweep.glob(f"*/{CONFIG_FILE}"))
    untuned = evaluate_run(first, UNTUNED)
    page = sweep / "report.html"
    outputs = ["--html", page, "--md", page.with_suffix(".md"), "--svg", page.with_suffix(".svg")]
    if report.main([f"untuned={untuned}", str(sweep), *map(str, outputs)]):
        raise RunError(f"No report of {shown(sweep)}; the runs are complete.")
    return page


def _quoted(path: Path) -> str:
    """A value that Hydra reads as this text."""
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"
