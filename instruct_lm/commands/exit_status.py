"""The exit status of every command: 0 when all was done, 2 for bad input, 128 + n after signal n, 1 for the rest."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from instruct_lm import __version__
from instruct_lm.errors import InputError, RunError, StoppedError, guard_logs, presentable
from instruct_lm.io import processes
from instruct_lm.io.failures import outside_failure

VERSION = f"instruct-lm {__version__}"
"""What every command prints for `--version`."""

_AGAIN = "What was written before is whole, and the same command goes on from there."


ENDING = [number for number in processes.SIGNALS if number != signal.SIGINT]
"""The signals that always end all of a command, unlike Ctrl-C, which stops an answer of the chat."""


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
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "Interrupted."
    if (failure := outside_failure(error)) is not None:
        return 1, presentable(f"{failure}\n{again}")
    return 1, presentable("".join(traceback.format_exception(error)).rstrip())


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
        with processes.stopping(ENDING):
            job(*args)
            sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
        return 1
    except (Exception, KeyboardInterrupt) as error:
        status, message = describe(error)
        print(message, file=sys.stderr)
        return status
    return 0
