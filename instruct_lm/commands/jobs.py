"""The jobs of a multirun, in whatever process a launcher runs them: what they leave when they fail, how they stop.

A job tells its multirun how it ended by a file in its folder, so that it makes no difference where it ran. The multirun
tells its jobs to stop by a file too, `STOP` in its own folder, which reaches jobs on other machines that share it.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from hydra.core.hydra_config import HydraConfig

from instruct_lm.commands.exit_status import describe
from instruct_lm.errors import StoppedError, without_secrets
from instruct_lm.io import processes
from instruct_lm.io.files import shown
from instruct_lm.io.locks import release
from instruct_lm.io.records import write_record
from instruct_lm.io.run_files import JOB
from instruct_lm.io.sweep_files import State, headline, read_job, write_job

log = logging.getLogger(__name__)

STOP = "stop.json"
"""In a sweep's folder: no job begins, and those that run stop with a checkpoint. It holds the sweep's exit status."""

_BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"  # it runs jobs one after another, here


def has_own_processes(hydra_cfg: Any) -> bool:
    """Whether a multirun's launcher runs jobs in processes of their own."""
    return bool(hydra_cfg.launcher["_target_"] != _BASIC)


def run_one_of_many(work: Callable[[], int], fail_fast: bool) -> None:
    """Do the job of a multirun that Hydra has started, and record in its folder how it ended, so that others go on.

    Args:
        work: Does it. Returns the exit status.
        fail_fast: Whether a failure ends the multirun.

    Raises:
        SystemExit: The multirun is to end, and its jobs share one process.
    """
    hydra_cfg: Any = HydraConfig.get()
    sweep, folder = Path(hydra_cfg.sweep.dir), Path(hydra_cfg.runtime.output_dir)
    task = [without_secrets(str(override)) for override in hydra_cfg.overrides.task]  # unresolved
    name, own_process = f"Job {hydra_cfg.job.num} of the multirun", has_own_processes(hydra_cfg)
    if (sweep / STOP).exists():
        log.info("%s is not begun: the multirun is ending.", name)
        return
    parent = os.getppid()
    message, stopped = "Something is left undone: its messages say what.", False
    try:
        with _stopped_by(sweep / STOP) if own_process else nullcontext():
            status = work()
    except (Exception, KeyboardInterrupt) as error:
        status, message = describe(error)
        stopped = isinstance(error, (StoppedError, KeyboardInterrupt))
    finally:
        if own_process:
            release()  # joblib keeps the process, and with it the folder would stay locked
    if status:
        log.error("%s %s (%s):\n%s", name, "was stopped" if stopped else "failed", " ".join(task), message)
        _record(folder, "stopped" if stopped else "failed", status=status, message=message, overrides=task)
    if own_process and os.getppid() != parent:
        os._exit(status)  # the launcher is gone; joblib's processes would wait for it for minutes
    if status and ((fail_fast and not stopped) or (stopped and not own_process)):
        ask_to_stop(sweep, status if stopped else 1)
        if not own_process:
            sys.exit(status)


def begin(folder: Path, continues: bool) -> None:
    """Record that a job begins; of one that failed before, say what this try does.

    Training from a checkpoint computes what training from the start does. So a job that has left one goes on from
    there: if its settings are the cause, such as a rate at which it diverges, it fails again, only sooner.

    Args:
        folder: The job's.
        continues: Whether it goes on from a checkpoint.
    """
    if (job := read_job(folder)).get("state") == "failed":
        how = "It is tried again from the start."
        if continues:
            how = "It goes on from its last checkpoint, where the same settings may fail the same way."
            how += f" Other settings are another job; to train this one anew, delete {shown(folder)}."
        log.warning("This job failed before: %s\n%s", headline(job["message"]), how)
    _record(folder, "running")


def _record(folder: Path, state: State, **details: Any) -> None:
    try:
        write_job(folder, state, **details)
    except OSError as error:  # such as a full disk, which may be why a job failed
        log.error("%s cannot be written: %s.", folder / JOB, error.strerror)


def ask_to_stop(sweep: Path, status: int) -> None:
    """Keep a multirun's jobs from beginning, and stop those in processes of their own; the first status stands."""
    if not (sweep / STOP).exists():
        write_record({"status": status}, sweep / STOP)


@contextmanager
def _stopped_by(file: Path) -> Iterator[None]:
    """In a launcher's process: stop at a signal, when `file` appears, or when the process's parent is gone.

    The process leaves the terminal's group: Ctrl-C reaches the sweep alone, which then writes the file.
    """
    with suppress(OSError, AttributeError):  # it leads a session already; Windows has no groups
        os.setpgid(0, 0)
    done, parent = threading.Event(), os.getppid()

    def watch() -> None:
        while not done.wait(0.5):
            if file.exists() or os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    with processes.stopping():
        watcher.start()
        try:
            with _mask("SIG_UNBLOCK"):
                yield
        finally:
            done.set()
            watcher.join()


@contextmanager
def signals_stop(sweep: Path) -> Iterator[None]:
    """While a launcher's processes work: the first signal asks the jobs to stop, a second one kills them.

    An exception would not do: launchers answer it by killing their processes, without a checkpoint. The signals are
    blocked too, which child processes inherit until their job begins, and a thread waits for those that stay blocked:
    joblib unblocks some.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    asked, ended = threading.Event(), threading.Event()

    def receive(number: int, frame: FrameType | None = None) -> None:
        if asked.is_set():
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    process.kill()
            os._exit(128 + number)
        asked.set()
        ask_to_stop(sweep, 128 + number)
        print("\nStopping the jobs, each with a checkpoint; once more to stop at once.", file=sys.stderr)

    def wait() -> None:
        while (number := signal.sigwait(processes.SIGNALS)) and not ended.is_set():
            receive(number)

    old = {number: signal.signal(number, receive) for number in processes.SIGNALS}
    with _mask("SIG_BLOCK"):
        waiter = threading.Thread(target=wait, daemon=True)
        waiter.start()
        try:
            yield
        finally:
            ended.set()
            signal.pthread_kill(waiter.ident or 0, signal.SIGUSR1)  # wakes it
            waiter.join()
            for number, handler in old.items():
                signal.signal(number, handler)


@contextmanager
def _mask(how: str) -> Iterator[None]:
    """Block or unblock the signals in this thread and in what it starts."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    old = signal.pthread_sigmask(getattr(signal, how), processes.SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
