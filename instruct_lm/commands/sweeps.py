"""Evaluation after training with `evaluate=true`, and after a multirun the report that compares its runs."""

import gc
import logging
import os
import shlex
import subprocess
import sys
from operator import attrgetter
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from instruct_lm.commands.runs import SPLIT_KEYS, load_run_config
from instruct_lm.errors import RunError
from instruct_lm.io.files import shown
from instruct_lm.io.processes import plain_environment
from instruct_lm.io.run_files import BEST, CONFIG_FILE, SUMMARY, UNTUNED

log = logging.getLogger(__name__)

COMMAND = Path(__file__).resolve().parents[2] / "evaluate.py"


def evaluate_run(run: Path, checkpoint: str = "best") -> Path:
    """Call `evaluate.py run=… checkpoint=…` in a process of its own, unless its results are there already.

    Args:
        run: The folder of a complete run.
        checkpoint: `best` or `untuned`.

    Returns:
        The evaluation's folder.

    Raises:
        RunError: The evaluation failed; the message says how to go on.
    """
    folder = run / "evaluation" / ("test" if checkpoint == "best" else f"test-{checkpoint}")
    done, weights = folder / SUMMARY, run / BEST
    new_weights = checkpoint == "best" and weights.is_file()
    up_to_date = done.is_file() and not (new_weights and weights.stat().st_mtime > done.stat().st_mtime)
    if up_to_date or not _is_first_process():
        return folder
    config = load_run_config(run)
    gc.collect()
    if config.fast:
        from instruct_lm.fast.allocator import give_back_freed_memory

        give_back_freed_memory()
    settings = [f"checkpoint={checkpoint}", f"device.accelerator={config.device.accelerator}"]
    settings += [] if config.fast else ["fast=false"]
    command = f"python evaluate.py {shlex.join([f'run={shown(run)}', *settings])}"
    log.info("evaluating: %s", command)
    quoted = QuotedString(str(run), Quote.single).with_quotes()  # Hydra then reads it as one text
    arguments = [sys.executable, str(COMMAND), f"run={quoted}", *settings]
    status = subprocess.run(arguments, env=plain_environment(), check=False).returncode
    if status:
        raise RunError(f"Evaluating {shown(run)} ended with status {status}. Go on with the sweep, or with: {command}")
    return folder


def compare_runs(sweep: Path) -> None:
    """Evaluate the untuned models of a sweep's runs and write a report that compares all runs with them.

    There is one untuned model for each combination of model, test split, prompt style and generation settings.

    Raises:
        RunError: An evaluation failed.
        InputError: The report cannot be made or written.
    """
    from instruct_lm.commands import report

    if not _is_first_process():
        return
    first: dict[tuple[Any, ...], Path] = {}
    for config_file in sorted(sweep.glob(f"*/{CONFIG_FILE}")):
        run = config_file.parents[1]
        config = load_run_config(run)
        settings = attrgetter("model", "prompt", "generation", "data.source", *SPLIT_KEYS)(config)
        first.setdefault((*settings, config.seed if config.data.shuffle else None), run)
    names = [UNTUNED if len(first) == 1 else f"{UNTUNED} of {run.name}" for run in first.values()]
    untuned = [f"{name}={evaluate_run(run, UNTUNED)}" for name, run in zip(names, first.values(), strict=True)]
    page = sweep / "report.html"
    report.write_report([*untuned, str(sweep)], page, page.with_suffix(".md"), page.with_suffix(".svg"))


def _is_first_process() -> bool:
    """False in the other processes of a training on several devices."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK"))
