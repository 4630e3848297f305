"""A multirun as a whole: its jobs and their folders before it begins, its failures and its report when it has ended.

All of it happens in the process that the user has started; `jobs.py` is what each job does in its own.
"""

import gc
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from instruct_lm.commands.jobs import STOP, has_own_processes, signals_stop
from instruct_lm.commands.pasting import command, override
from instruct_lm.commands.runs import SPLIT_KEYS, evaluation_is_current, load_run_config
from instruct_lm.errors import InputError, RunError, StoppedError
from instruct_lm.io import processes
from instruct_lm.io.conf_files import CONF
from instruct_lm.io.files import shown
from instruct_lm.io.processes import plain_environment
from instruct_lm.io.records import read_record
from instruct_lm.io.run_files import CONFIG_FILE, SUMMARY, UNTUNED, evaluation_dir
from instruct_lm.io.sweep_files import unfinished_jobs, varied_keys, write_jobs

log = logging.getLogger(__name__)

COMMAND = CONF.parent / "evaluate.py"


@dataclass(frozen=True)
class Sweep:
    """A multirun that is about to begin.

    Attributes:
        folder: Where each job has a folder.
        jobs: Name of its folder → its overrides.
        evaluate: Whether a report is to follow.
        own_processes: Whether a launcher runs each job in a process of its own.
    """

    folder: Path
    jobs: Mapping[str, Sequence[str]]
    evaluate: bool
    own_processes: bool

    def listening(self) -> AbstractContextManager[None]:
        """Signals stop its jobs, wherever they run."""
        return signals_stop(self.folder) if self.own_processes else nullcontext()


def plan(master: DictConfig, folder: Path, program: str) -> Sweep:
    """List the jobs of a multirun and record them in its folder.

    Args:
        master: What Hydra composed without the values that differ; its hydra section may be changed.
        folder: The multirun's.
        program: Such as `train.py`.

    Raises:
        InputError: A multirun that cannot be run as it is: the message says what to do instead.
    """
    if not master.hydra.sweeper["_target_"].endswith(".BasicSweeper"):
        raise InputError("hydra/sweeper: these commands sweep over values that are listed. Leave hydra/sweeper out.")
    overrides = [f"{key}={value}" for key, value in (master.hydra.sweeper.params or {}).items()]
    loader = GlobalHydra.instance().config_loader()
    parsed = OverridesParser.create(loader).parse_overrides([*overrides, *master.hydra.overrides.task])
    (batch,) = BasicSweeper.split_arguments(parsed, None)
    composed = _composed(master, batch)
    _check(composed, batch, master.get("output_dir"), program, folder)
    names = [_folder_name(config) for config in composed]
    if len({name.casefold() for name in names}) < len(names):
        # Keys that are left out of names tell these jobs apart: from now on a key that differs is named.
        swept = varied_keys(batch)
        left_out = "hydra.job.config.override_dirname.exclude_keys"
        kept = [key for key in OmegaConf.select(master, left_out) if key not in swept]
        with read_write(master), open_dict(master):
            master.hydra.overrides.hydra.append(f"{left_out}=[{','.join(kept)}]")
        names = [_folder_name(config) for config in _composed(master, batch)]
    for i, name in enumerate(names):
        if (first := [each.casefold() for each in names].index(name.casefold())) < i:
            raise InputError(
                f"Jobs {first} and {i} ({' '.join(batch[i])}) would share the folder {name}. Leave out what is given "
                "twice, or number the folders: 'hydra.sweep.subdir=${hydra.job.num}'."
            )
    jobs = dict(zip(names, batch, strict=True))
    if processes.is_first():
        write_jobs(folder, jobs)
        (folder / STOP).unlink(missing_ok=True)
    evaluate = any(config.get("evaluate", False) for config in composed)
    own_processes = has_own_processes(master.hydra)
    if own_processes:  # which find the package here where it is not installed
        paths = [str(CONF.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
        os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")  # one of those that training answers; else USR2
    return Sweep(folder, jobs, evaluate, own_processes)


def _composed(master: DictConfig, batch: Sequence[Sequence[str]]) -> list[DictConfig]:
    """The configuration of each job, as a launcher will compose it."""
    loader, configs = GlobalHydra.instance().config_loader(), []
    for number, overrides in enumerate(batch):
        config = loader.load_sweep_config(master, list(overrides))
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.job.id, config.hydra.job.num = str(number), number
        configs.append(config)
    return configs


def _folder_name(config: DictConfig) -> str:
    """The name of a job's folder; `${hydra:…}` in it is resolved as Hydra will."""
    instance = HydraConfig.instance()
    before, instance.cfg = instance.cfg, None
    try:
        instance.set_config(config)
        return str(config.hydra.sweep.subdir)
    finally:
        instance.cfg = before


def _check(
    composed: Sequence[DictConfig], batch: Sequence[Sequence[str]], output_dir: str | None, program: str, folder: Path
) -> None:
    """Raise an InputError for what no multirun can do."""
    for config in composed:
        if config.get("output_dir") != output_dir:
            raise InputError(
                f"output_dir={config.get('output_dir')} differs between the jobs. Give one: it is the multirun's "
                "folder, in which each job has a folder of its own."
            )
        if config.get("resume") is not None:
            raise InputError(f"resume={config.resume} continues one run: leave out -m (--multirun).")
    several = [config.device for config in composed if "device" in config and _several(config.device)]
    if several:
        lines = []
        for config, overrides in zip(composed, batch, strict=True):
            given = [each for each in overrides if not each.startswith("output_dir=")]
            given += ["hydra.mode=RUN"] if "experiment" in config else []  # which may be a multirun of itself
            place = override("output_dir", folder / _folder_name(config))
            lines.append(shlex.join(["python", program, *given, place]))
        devices = f"device.devices={several[0].devices} device.num_nodes={several[0].num_nodes}"
        raise InputError(
            f"{devices}: each process of a job would repeat the multirun. Run the jobs by themselves:\n"
            + "\n".join(lines)
        )


def _several(device: DictConfig) -> bool:
    return (device.devices, device.num_nodes) != (1, 1)


def conclude(sweep: Sweep, ended: BaseException | None, compare: Callable[[Path], object] | None) -> None:
    """Say which jobs are not complete, as their folders have it, and make the report if one was asked for.

    Args:
        sweep: The multirun.
        ended: What ended it early, if something did.
        compare: Makes the report.

    Raises:
        InputError: Every job was refused.
        RunError: Jobs are not complete, or the report cannot be made.
        StoppedError: A signal has stopped the multirun.
    """
    if not processes.is_first():
        return
    stop = (read_record(sweep.folder / STOP) or {}).get("status")
    (sweep.folder / STOP).unlink(missing_ok=True)
    left = unfinished_jobs(sweep.folder)
    for job in left:
        log.error("%s: %s%s", shown(sweep.folder / job.name), job.words, f": {job.message}" if job.message else "")
    again = "The same command tries again what failed, and does what is missing; it keeps what is complete."
    message = f"{len(left)} of {len(sweep.jobs)} jobs are not complete. {again}"
    if stop is not None and stop > 128:
        raise StoppedError(f"The multirun was stopped: {message}", stop - 128)
    if isinstance(ended, StoppedError):
        raise StoppedError(f"The multirun was stopped: {message}", ended.signal)
    if ended is not None and not isinstance(ended, SystemExit):
        name = type(ended).__name__
        raise RunError(f"The launcher has failed, and some jobs may still run.\n{name}: {ended}\n{message}") from ended
    if stop is None and sweep.evaluate and compare is not None and len(left) < len(sweep.jobs):
        compare(sweep.folder)
    if left:
        refused = all(job.status == 2 for job in left) and len(left) == len(sweep.jobs)
        raise (InputError if refused else RunError)(message)


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
    folder = evaluation_dir(run, checkpoint=checkpoint)
    if not processes.is_first() or evaluation_is_current(run, folder, checkpoint):
        return folder
    config = load_run_config(run)
    gc.collect()
    if config.fast:
        from instruct_lm.fast.allocator import give_back_freed_memory

        give_back_freed_memory()
    settings: dict[str, Any] = {"checkpoint": checkpoint, "device.accelerator": config.device.accelerator}
    settings |= {} if config.fast else {"fast": False}
    shown_command = command("evaluate.py", run=run, **settings)
    log.info("evaluating: %s", shown_command)
    arguments = [override(key, value) for key, value in {"run": str(run), **settings}.items()]
    line = [sys.executable, str(COMMAND), *arguments]
    status = subprocess.run(line, env=plain_environment(), check=False).returncode
    if status:
        raise RunError(f"Evaluating {shown(run)} ended with status {status}. Go on with: {shown_command}")
    return folder


def compare_runs(sweep: Path) -> None:
    """Evaluate the untuned models of a sweep's runs and write a report that compares all runs with them.

    There is one untuned model for each combination of model, test split, prompt style and generation settings.

    Raises:
        RunError: An evaluation failed.
        InputError: The report cannot be made or written.
    """
    from instruct_lm.commands import report

    if not processes.is_first():
        return
    first: dict[tuple[Any, ...], Path] = {}
    runs = sorted(file.parent for file in sweep.glob(f"*/{SUMMARY}") if (file.parent / CONFIG_FILE).is_file())
    # A multirun that has grown keeps the evaluation that it has, whatever jobs now come first.
    for run in sorted(runs, key=lambda run: not evaluation_dir(run, checkpoint=UNTUNED).is_dir()):
        config = load_run_config(run)
        settings = attrgetter("model", "prompt", "generation", "device.precision", "data.source", *SPLIT_KEYS)(config)
        first.setdefault((*settings, config.seed if config.data.shuffle else None), run)
    untuned = [str(evaluate_run(run, UNTUNED)) for run in first.values()]
    page = sweep / "report.html"
    report.write_report([*untuned, str(sweep)], page, page.with_suffix(".md"), page.with_suffix(".svg"))
