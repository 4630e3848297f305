"""What follows training with `evaluate=true`: the run's answers and scores and, after a multirun, the comparison."""

from __future__ import annotations

import gc
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import OmegaConf

from instruct_lm.commands.runs import SPLIT_KEYS, load_run_config
from instruct_lm.errors import RunError
from instruct_lm.fast.allocator import give_back_freed_memory
from instruct_lm.io.files import shown
from instruct_lm.io.run_files import BEST, CONFIG_FILE, SUMMARY, UNTUNED

log = logging.getLogger(__name__)

COMMAND = Path(__file__).resolve().parents[2] / "evaluate.py"


def evaluate_run(run: Path, checkpoint: str = "best") -> Path:
    """Call `evaluate.py run=… checkpoint=…` in a process of its own, unless that was done.

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
    if not _is_first_process():
        return folder
    if done.is_file() and not (checkpoint == "best" and weights.is_file() and _is_newer(weights, done)):
        return folder
    gc.collect()
    give_back_freed_memory()
    accelerator = load_run_config(run).device.accelerator
    arguments = [f"run={_quoted(run)}", f"checkpoint={checkpoint}", f"device.accelerator={accelerator}"]
    log.info("evaluating: python evaluate.py %s", shlex.join([f"run={shown(run)}", *arguments[1:]]))
    status = subprocess.run([sys.executable, str(COMMAND), *arguments], check=False).returncode
    if status:
        raise RunError(
            f"The evaluation of {shown(run)} ended with status {status}. Go on with: python evaluate.py "
            f"{shlex.join([f'run={shown(run)}', f'checkpoint={checkpoint}'])}, or with the whole sweep once more."
        )
    return folder


def compare_runs(sweep: Path) -> None:
    """Evaluate the untuned models of a sweep's runs and write a report that holds all runs against them.

    There is one for each model, test split, prompt style and way to generate.

    Raises:
        RunError: The evaluation or the report failed; the message says which.
    """
    from instruct_lm.commands import report

    if not _is_first_process():
        return
    first: dict[tuple[Any, ...], Path] = {}
    for config_file in sorted(sweep.glob(f"*/{CONFIG_FILE}")):
        run = config_file.parents[1]
        cfg = load_run_config(run)
        split = [OmegaConf.select(cfg, key) for key in ("data.source", *SPLIT_KEYS)]
        seed = cfg.seed if cfg.data.shuffle else None
        first.setdefault((cfg.model, cfg.prompt, cfg.generation, *split, seed), run)
    untuned = []
    for run in first.values():
        name = UNTUNED if len(first) == 1 else f"{UNTUNED} of {run.name}"
        untuned.append(f"{name}={evaluate_run(run, UNTUNED)}")
    page = sweep / "report.html"
    outputs = ["--html", page, "--md", page.with_suffix(".md"), "--svg", page.with_suffix(".svg")]
    if report.main([*untuned, str(sweep), *map(str, outputs)]):
        raise RunError(f"There is no report of {shown(sweep)}; its runs are complete.")


def _is_first_process() -> bool:
    """False in the other processes of a training on several devices."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK"))


def _is_newer(path: Path, other: Path) -> bool:
    return path.stat().st_mtime > other.stat().st_mtime


def _quoted(path: Path) -> str:
    """A value that Hydra reads as this text."""
    return QuotedString(str(path), Quote.single).with_quotes()
