"""The exit status of every command: 0 when all was done, 2 for bad input, 128 + n after signal n, 1 for the rest."""

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, NoReturn

from instruct_lm.errors import InputError, RunError, StoppedError, guard_logs, presentable

_AGAIN = "What was written before is whole, and the same command goes on from there."
_SYSTEM = {
    errno.ENOSPC: "No room is left on the disk. Free some, or give an output_dir on another disk.",
    errno.EDQUOT: "The disk quota is used up. Free some of it, or give an output_dir on another disk.",
    errno.EFBIG: "The file would be larger than this disk or this user may have. Give an output_dir on another disk.",
    errno.EROFS: "The disk is read-only. Give an output_dir, or a cache_dir, on another.",
    errno.EACCES: "Permission denied. Give another path, or have its permissions changed.",
    errno.EPERM: "Not permitted. Give another path, or have its permissions changed.",
    errno.EMFILE: "Too many files are open in this process. Raise the limit (ulimit -n), or lower data.num_workers.",
    errno.ENFILE: "Too many files are open on this machine. Close some programs.",
    errno.EIO: "The disk failed (input/output error). Look at its health before you go on.",
    errno.ESTALE: "A network disk lost the file (stale handle). Look whether it is mounted.",
    errno.ENAMETOOLONG: "The name is too long for this disk. Give a shorter one.",
    errno.ENOENT: "No such file or folder; it may have been moved or deleted meanwhile. Put it back.",
    errno.ENOTDIR: "A part of the path is a file, not a folder. Give another path.",
    errno.EISDIR: "It is a folder, not a file. Give another path.",
    errno.EPIPE: "The program that read this output has ended.",
    errno.ENOMEM: "The system has no memory left. Close some programs, or lower data.batch_size.",
}
_SMALLER = (
    "Lower data.batch_size (with trainer.accumulate, for the same result) or generation.batch_size, set "
    "trainer.activation_checkpointing=true, or take a smaller model"
)


class TerminatedError(SystemExit):
    """A signal that ends a command; unlike Ctrl-C, which stops an answer of the chat, always all of it.

    Args:
        number: The signal's number; the exit status is 128 more.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def describe(error: BaseException, again: str = _AGAIN) -> tuple[int, str]:
    """The exit status of an error and its message: a traceback only where the error is a bug.

    Args:
        error: What was raised.
        again: What is kept, and how to go on, where disk, memory or device failed.
    """
    if isinstance(error, StoppedError):
        return error.status, str(error)
    if isinstance(error, (InputError, RunError)):
        return 2 if isinstance(error, InputError) else 1, str(error)
    if isinstance(error, TerminatedError):
        return 128 + error.number, f"Ended by {signal.Signals(error.number).name}. What was written before is whole."
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "Interrupted."
    if (outside := _from_outside(error, again)) is not None:
        return 1, presentable(outside)
    return 1, presentable("".join(traceback.format_exception(error)).rstrip())


def _from_outside(error: BaseException, again: str) -> str | None:
    """What disk, memory or device did, and how to go on; None for any other error."""
    text, kind = str(error), type(error)
    if isinstance(error, OSError):
        return _system_error(error, again)
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return f"No memory is left ({_first_line(text) or 'MemoryError'}). {_SMALLER}.\n{again}"
    if not kind.__module__.startswith("torch") and not isinstance(error, RuntimeError):
        return None
    if kind.__name__ == "OutOfMemoryError" or "out of memory" in text:
        return f"The device has no memory left ({_first_line(text)}). {_SMALLER}.\n{again}"
    if kind.__name__ == "AcceleratorError" or any(name in text for name in ("CUDA error", "NCCL error", "cuDNN error")):
        return f"The device failed ({_first_line(text)}). Look at it (nvidia-smi), or give device=cpu.\n{again}"
    if "PytorchStreamWriter" in text or "inline_container" in text:  # torch.save hides what its file said
        found = next((each for each in _chain(error) if isinstance(each, OSError) and each.errno in _SYSTEM), None)
        reason = found and _system_error(found, again)
        return reason or f"A file could not be written, most likely for want of room on the disk.\n{again}"
    return None


def _system_error(error: OSError, again: str) -> str | None:
    """An operating system's error in words; None where it has no number, as errors of libraries."""
    if error.errno is None:
        return None
    place = ": ".join(str(each) for each in (error.filename, error.filename2) if each is not None)
    words = _SYSTEM.get(error.errno, f"{error.strerror or os.strerror(error.errno)}.")
    return f"{place}: {words}\n{again}" if place else f"{words}\n{again}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(text: str) -> str:
    return next((line.strip().rstrip(".")[:300] for line in text.splitlines() if line.strip()), "")


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the command with a word and nothing half-written."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise TerminatedError(number)

    in_main_thread = threading.current_thread() is threading.main_thread()  # others cannot have handlers
    with ExitStack() as handlers:
        for name in ("SIGTERM", "SIGHUP") if in_main_thread else ():
            number = getattr(signal, name, None)  # Windows lacks SIGHUP
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):  # ignored: under nohup
                handlers.callback(signal.signal, number, signal.signal(number, end))
        yield


def drop_output() -> None:
    """After a broken pipe, as with `| head`: Python must not fail again when it flushes at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def exit_status(job: Callable[..., object], *args: Any) -> int:
    """Call `job(*args)` and return the exit status, after a message on stderr where it failed."""
    guard_logs()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # not every stream is UTF-8
    try:
        with ended_by_signals():
            job(*args)
            sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
        return 1
    except (Exception, KeyboardInterrupt, TerminatedError) as error:
        status, message = describe(error)
        print(message, file=sys.stderr)
        return status
    return 0
