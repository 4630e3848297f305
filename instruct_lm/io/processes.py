"""The processes of a command: which one this is, who started it, and the signals that end it; needs no torch."""

import os
import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import NoReturn

from instruct_lm.errors import StoppedError

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
"""Ctrl-C, the end of a job, of a terminal, and a scheduler's warning; Windows lacks the last two."""

LAUNCHED = "INSTRUCT_LM_LAUNCHED"
"""Set in processes that `instruct_lm.commands.launch` has started."""

_OWN = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", LAUNCHED),
)


def is_launched() -> bool:
    """Whether a command of this project has started this process as one of several."""
    return LAUNCHED in os.environ


def launcher() -> str | None:
    """The program that started this process as one of several: ``torchrun``, ``srun`` or, if this project, ``own``."""
    if is_launched():
        return "own"
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        return "torchrun"
    if int(os.environ.get("SLURM_NTASKS") or 1) > 1 and "SLURM_STEP_ID" in os.environ:  # a batch script has no step
        return "srun"
    return None


def rank() -> int:
    """The number of this process among those of its command, from 0."""
    kind = launcher()
    return int(os.environ["SLURM_PROCID" if kind == "srun" else "RANK"]) if kind else 0


def is_first() -> bool:
    """False in all processes of a command but its first, also where something else has started them."""
    return rank() == 0 and all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK"))


def local_rank() -> int:
    """The number of this process among those of its command on this machine, from 0."""
    kind = launcher()
    return int(os.environ["SLURM_LOCALID" if kind == "srun" else "LOCAL_RANK"]) if kind else 0


def world_size() -> int:
    """The number of processes of this command."""
    kind = launcher()
    return int(os.environ["SLURM_NTASKS" if kind == "srun" else "WORLD_SIZE"]) if kind else 1


def local_world_size() -> int:
    """The number of them on this machine, as torchrun tells it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def plain_environment() -> dict[str, str]:
    """The environment for another command, which is not one of these processes."""
    return {name: value for name, value in os.environ.items() if name not in _OWN and "TORCHELASTIC" not in name}


def signal_name(number: int) -> str:
    """`SIGTERM` for 15."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class SignalReceived(SystemExit):
    """A signal that `stopping` waits for came here. Nothing that handles errors may take it for one of its own.

    Args:
        number: The signal's number; the exit status is 128 more.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


@contextmanager
def stopping(signals: Collection[int] = SIGNALS) -> Iterator[None]:
    """Let signals end the block, as a `SignalReceived` within it; what was there before is restored at the end.

    Raises:
        StoppedError: A signal came.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise SignalReceived(number)

    in_main_thread = threading.current_thread() is threading.main_thread()  # others cannot have handlers
    with ExitStack() as handlers:
        for number in signals if in_main_thread else ():
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # of nohup: the terminal's end is not the run's
                handlers.callback(signal.signal, number, signal.signal(number, stop))
        try:
            yield
        except SignalReceived as received:
            message = f"Ended by {signal_name(received.number)}. What was written before is whole."
            raise StoppedError(message, received.number) from received
