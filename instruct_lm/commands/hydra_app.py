"""What the configured commands share: Hydra, its errors in plain words and the exit status."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from instruct_lm.commands import folders, help_text, jobs, runs, sweeps
from instruct_lm.commands.arguments import check_arguments
from instruct_lm.commands.check_config import make_config
from instruct_lm.commands.deferred_imports import defer_imports
from instruct_lm.commands.exit_status import ENDING, describe, drop_output
from instruct_lm.commands.pasting import command
from instruct_lm.config import COMMANDS, CommonConfig
from instruct_lm.errors import InputError, RunError, guard_logs
from instruct_lm.io import processes
from instruct_lm.io.conf_files import CONF
from instruct_lm.io.locks import own, release
from instruct_lm.io.network import DownloadError
from instruct_lm.io.run_files import LAST
from instruct_lm.io.sources import file_stem
from instruct_lm.io.sweep_files import read_job, write_job

log = logging.getLogger(__name__)

_HASHED = ("model.weights", "model.tokenizer", "judge.weights", "second_judge.weights")
_HASH_OF = {"data.source": "data.sha256"} | {key: f"{key}_sha256" for key in _HASHED}


@contextmanager
def hydra_command(
    name: str, main: Callable[[Any], int | None], conclude: Callable[[Path], object] | None = None
) -> Iterator[Callable[[], None]]:
    """Give Hydra's entry to `main` and end the process with the exit status of what happened inside the `with` block.

    The entry composes `conf/<name>.yaml` from the command line and calls `main` with the typed configuration; in a
    multirun for each job, one failure or more notwithstanding, in the processes that the launcher gives them. It is
    called inside the block rather than here, so that a traceback shows as few frames as possible::

        with hydra_command("train", main) as run:
            run()

    Args:
        name: One of `COMMANDS`.
        main: Does the job. Returns None or 0 when all was done, 1 when something is left undone.
        conclude: Called with the folder of a multirun after its last job, if it is one with `evaluate=true`.

    Raises:
        SystemExit: Always: 0 when all was done; 2 for bad input or configuration, 128 + n after signal n, and 1 for
            anything else, after a message on stderr.
    """
    guard_logs()
    logging.raiseExceptions = False  # a log file on a full disk must not hide the message on the terminal
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors, else it prints them and exits with 1
    sweep: list[sweeps.Sweep] = []  # the one that was begun
    ended: BaseException | None = None
    status, waiting, refused = 0, ExitStack(), False

    def on_multirun(master: DictConfig, folder: Path) -> None:
        register()  # once is enough, and Hydra sends these functions to the launcher's processes
        sweep.append(sweeps.plan(master, folder, f"{name}.py"))
        waiting.enter_context(sweep[0].listening())

    try:
        register(start=check_arguments(name), on_multirun=on_multirun)
        try:
            with waiting, nullcontext() if name == "train" else processes.stopping(ENDING):  # training does it
                yield hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(Job(name, main))
        except BrokenPipeError:
            raise
        except (Exception, SystemExit) as error:
            if sweep:
                ended = error
            elif isinstance(error, (HydraException, OmegaConfBaseException, ValueError, OSError)):
                raise _explained(error) from error
            else:
                raise
        if sweep:
            sweeps.conclude(sweep[0], ended, conclude)
        sys.stdout.flush()
    except BrokenPipeError:  # of --help | head
        drop_output()
        status = 1
    except SystemExit as error:  # a job's
        refused = error.code == 2 or isinstance(error.__cause__, DownloadError)
        raise
    except (Exception, KeyboardInterrupt) as error:
        status, message = describe(error)
        refused = status == 2
        print(message, file=sys.stderr)
    finally:
        release()
        if refused:
            folders.drop_unused()
    sys.exit(status)


@dataclass
class Job:
    """What Hydra calls for each job, here or in a launcher's process, which gets it as a pickle.

    Attributes:
        name: One of `COMMANDS`.
        main: As `hydra_command` takes it.
    """

    name: str
    main: Callable[[Any], int | None]

    def __call__(self, cfg: DictConfig) -> None:
        """Do the job."""
        guard_logs()  # here too: a launcher's process has not called `hydra_command`
        defer_imports()
        hydra_cfg = HydraConfig.get()
        if hydra_cfg.mode == RunMode.MULTIRUN:
            return jobs.run_one_of_many(lambda: self._work(cfg, True), cfg.get("fail_fast", False))
        failure: BaseException | None = None
        try:
            status = self._work(cfg, False)
        except (Exception, KeyboardInterrupt) as error:
            status, message = describe(error, *_way_on(Path(hydra_cfg.runtime.output_dir)))
            log.error(message)
            failure = error
        if status:
            raise SystemExit(status) from failure

    def _work(self, cfg: DictConfig, sweep: bool) -> int:
        config = prepare(self.name, cfg)
        if sweep:
            jobs.begin(config.folder, getattr(config, "resume", None) is not None)
        with processes.stopping() if self.name != "export" else nullcontext():
            status = self.main(config) or 0
        if not status and read_job(config.folder):  # also of one that is continued by itself
            write_job(config.folder, "complete")
        return status


def register(
    start: bool = False, on_multirun: Callable[[DictConfig, Path], None] = lambda master, folder: None
) -> None:
    """Make the functions known that `conf/` calls.

    Args:
        start: Whether the command will run: then those that give its folder make this process the folder's owner.
        on_multirun: Called with what Hydra composed for a multirun and with its folder, before it begins.
    """

    def planned(folder: str, *, _root_: DictConfig) -> str:
        if _root_.hydra.mode == RunMode.MULTIRUN:
            on_multirun(_root_, Path(folder).absolute())
        return folder

    OmegaConf.register_new_resolver("planned", planned, replace=True)  # OmegaConf caches none that takes _root_
    # Cached: Hydra asks more than once, and the answer must not change when a run's folder fills.
    resolvers: dict[str, Any] = {
        "train_dir": partial(folders.train_dir, start=start),
        "evaluate_dir": partial(folders.evaluate_dir, start=start),
        "sweep_dir": partial(folders.sweep_dir, start=start),
        "file_name": folders.file_name,
        "record_dir": folders.record_dir,
        "help_keys": help_text.help_keys,
        "fitted": help_text.fitted,
    }
    for name, function in resolvers.items():
        OmegaConf.register_new_resolver(name, function, replace=True, use_cache=True)


def prepare(name: str, cfg: DictConfig) -> CommonConfig:
    """Turn what Hydra composed into the typed configuration, and record it in a training run's folder.

    After `resume=` or `run=` it is the run's, with what the command line may change.

    Raises:
        InputError: Values or combinations at fault, or a run folder that does not go with them.
    """
    hydra_cfg = HydraConfig.get()
    kind: Any = COMMANDS[name]
    sweep, folder = hydra_cfg.mode == RunMode.MULTIRUN, Path(hydra_cfg.runtime.output_dir)
    task: Any = OmegaConf.to_container(hydra_cfg.overrides.task)  # unresolved
    overrides = OverridesParser.create().parse_overrides(task)
    given = [override.package or override.key_or_group for override in overrides]
    for source, sha256 in _HASH_OF.items():
        if source in given and sha256 not in given:  # a known hash belongs to its source
            OmegaConf.update(cfg, sha256, None)
            given.append(sha256)
    if name != "export":  # which writes into no folder of Hydra's
        cfg.output_dir = str(folder)
    try:
        values: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise InputError(f"{error.full_key}: {_first_line(error)}. Give it a plain value.") from error
    if "data.source" in given and "data.name" not in given:  # a name belongs to its source, too
        values["data"]["name"] = file_stem(str(values["data"]["source"]))
        given.append("data.name")
    if sweep and processes.is_first():
        own(folder)  # against a command that resumes this job alone
    if sweep and name == "train" and runs.is_begun(folder):  # by an earlier call of the same sweep
        values["resume"], given = str(folder), list(values)
    if values.get("resume") is not None:
        config: Any = runs.resumed(make_config(kind, values, combinations=False), given)
    elif values.get("run") is not None:
        config = runs.taken_from_run(make_config(kind, values, combinations=False), given)
    else:
        config = make_config(kind, values)
    if name == "train" and config.trainer.keep_last is None:
        config = config.model_copy(update={"trainer": config.trainer.model_copy(update={"keep_last": not sweep})})
    if name == "train" and hydra_cfg.output_subdir is not None:  # null in all processes but the first
        runs.save_config(config)
    return config


def _way_on(folder: Path) -> list[str]:
    """What is kept of a run that disk or device stopped, and the command that continues it; none: there is no run."""
    if not (folder / LAST).is_file():
        return []
    return [f"The last checkpoint is whole. Continue with: {command('train.py', resume=folder)}"]


def _explained(error: BaseException) -> Exception:
    """What Hydra complains of, in a line or two; what disk or lock failed at as it is."""
    while isinstance(error, InterpolationResolutionError) and error.__context__ is not None:
        error = error.__context__  # what a function that conf/ calls has raised
    if isinstance(error, (InputError, RunError)):
        return error
    if isinstance(error, OSError) and error.errno is not None:
        if error.filename and isinstance(error, (FileExistsError, NotADirectoryError, PermissionError)):
            place = f"output_dir: cannot make {error.filename}"
            return InputError(f"{place} ({error.strerror}). Choose another output_dir.")
        return error
    lines = [_first_line(each) for each in (error, error.__cause__) if each is not None]
    if "hydra/launcher/" in lines[0]:
        lines.append("joblib, submitit_local and submitit_slurm need, in the repository: pip install -e '.[clusters]'")
    return InputError("\n".join(lines))


def _first_line(text: object) -> str:
    return next((line.strip().rstrip(".") for line in str(text).splitlines() if line.strip()), "")
