"""Runs the project's commands cheaply: a server that has imported torch forks a process for each.

A command then takes as long as its work, not the seconds of its imports. What runs is the script itself, under its own
arguments and in its own folder, with what it prints in a file; tests/faults/test_commands.py compares its results with
those of a command that a shell starts.
"""

import ctypes
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 180.0  # seconds; a command that takes longer hangs

_PRELOADED = [
    *("torch", "lightning.pytorch", "torch.utils.tensorboard", "hydra", "pydantic", "safetensors.torch", "sacrebleu"),
    *("instruct_lm.commands.build", "instruct_lm.commands.hydra_app", "instruct_lm.commands.sweeps"),
    *("instruct_lm.training.trainer", "instruct_lm.training.memory", "instruct_lm.fast", "instruct_lm.report"),
    *("instruct_lm.evaluation.scoring", "instruct_lm.evaluation.tensorboard", "instruct_lm.commands.export"),
]
_LOCK = threading.Lock()  # multiprocessing looks after the ends of all processes when it starts one
_BYPASSES = (1, 2)  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH of linux/capability.h: root reads what nobody may
_CAPABILITY_VERSION_3 = 0x20080522


class Job:
    """A command that runs.

    Args:
        script: `train.py`, `evaluate.py`, or a module such as `instruct_lm.export`.
        args: Its arguments.
        folder: Where it runs.
        limited: Whether root's right to read any file is taken from it.
    """

    def __init__(self, script: str, *args: str, folder: Path, limited: bool = False) -> None:
        self.words = " ".join([script, *args])
        file, name = tempfile.mkstemp(prefix="said-")  # not in the folder, whose disk may be full
        os.close(file)
        self.output = Path(name)
        arguments = (script, args, str(folder), str(self.output), limited)
        with _LOCK:
            self.process: ForkServerProcess = _context().Process(target=_run, args=arguments)
            self.process.start()

    @property
    def said(self) -> str:
        """What it has printed so far."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        with _LOCK:
            return self.process.exitcode is None

    def send(self, number: int) -> None:
        """Send a signal; nothing happens if it has ended."""
        with suppress(ProcessLookupError):
            if self.process.pid is not None:
                os.kill(self.process.pid, number)

    def wait_until(self, seen: Callable[[], bool], pause: float = 0.001) -> bool:
        """Look again and again until something is there; False if the command ended before, or hangs."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.running:
            if seen():
                return True
            time.sleep(pause)
        return False

    def wait(self) -> "Ended":
        """Wait for its end; a command that hangs is killed and its status is None."""
        self.wait_until(lambda: False, pause=0.01)
        hung = self.running
        if hung:
            self.send(signal.SIGKILL)
            self.wait_until(lambda: False, pause=0.01)
        ended = Ended(self.words, None if hung else self.process.exitcode, self.said)
        self.output.unlink(missing_ok=True)
        return ended


class Ended:
    """A command that has ended.

    Attributes:
        status: The exit status, -n after signal n; None if it hung.
    """

    def __init__(self, words: str, status: int | None, said: str) -> None:
        self.words, self.status, self.said = words, status, said

    @property
    def is_clean(self) -> bool:
        """Whether it ended by itself, in words: no traceback and no more than a screen of text at its end."""
        return self.status is not None and "Traceback (most recent call last)" not in self.said

    @property
    def refused(self) -> bool:
        """Whether it ended with an error in words."""
        return self.is_clean and self.status in (1, 2) and bool(self.said.strip())

    def __str__(self) -> str:
        lines = [line for line in self.said.strip().splitlines() if line.strip()]
        end = "hung" if self.status is None else f"status {self.status}"
        return f"{self.words}: {end}: {' / '.join(line[:200] for line in lines[-3:])}"


def call(script: str, *args: str, folder: Path, limited: bool = False) -> Ended:
    """Run a command to its end."""
    return Job(script, *args, folder=folder, limited=limited).wait()


def must(script: str, *args: str, folder: Path) -> Ended:
    """Run a command without a fault.

    Raises:
        RuntimeError: It failed.
    """
    ended = call(script, *args, folder=folder)
    if ended.status != 0:
        raise RuntimeError(f"without any fault: {ended.words}\n{ended.said}")
    return ended


def _context() -> ForkServerContext:
    # One thread, also in what the commands start: sums then have one order, and two jobs do not fight for the cores.
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "HYDRA_FULL_ERROR": "0"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _run(script: str, args: tuple[str, ...], folder: str, output: str, limited: bool) -> None:
    """The forked process: becomes the command."""
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.chdir(folder)
    multiprocessing.set_start_method(None, force=True)  # a data loader's workers start as they do for a user
    if limited:
        _give_up_bypasses()
    path = ROOT / script
    sys.argv = [str(path), *args]
    status: object = 0
    try:
        if script.endswith(".py"):
            sys.path.insert(0, str(ROOT))
            runpy.run_path(str(path), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        traceback.print_exc()
        status = 1
    # multiprocessing would end here without the interpreter's own end, which closes files and calls what atexit holds.
    ctypes.pythonapi.Py_Exit(ctypes.c_int(status if isinstance(status, int) else int(status is not None)))


def _give_up_bypasses() -> None:
    """Take from root what lets it read and write files whose permissions say no."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets) == 0:
        for first in (0, 1):  # effective and permitted; the inheritable set is the third
            for capability in _BYPASSES:
                sets[first] &= ~(1 << capability)
        libc.capset(header, sets)
