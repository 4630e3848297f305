"""How a training run ends other than at its limits: what it has kept, and the command that goes on."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from instruct_lm.commands import launch
from instruct_lm.commands.pasting import command
from instruct_lm.commands.runs import is_begun
from instruct_lm.config import TrainConfig
from instruct_lm.errors import InputError, RunError, StoppedError
from instruct_lm.io import processes
from instruct_lm.io.failures import outside_failure
from instruct_lm.io.run_files import BEST


@contextmanager
def explained(config: TrainConfig) -> Iterator[None]:
    """Make of a signal, a divergence or a failing machine an error that says what is kept and how to go on.

    Raises:
        StoppedError: A signal has ended the block.
        RunError: The run has diverged, or the machine has failed.
    """
    excepthook, complain = threading.excepthook, logging.raiseExceptions
    # A full disk stops TensorBoard's thread and train.log too. The thread's error comes again where it is written to.
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else excepthook(args)
    logging.raiseExceptions = False
    try:
        with processes.stopping():
            yield
    except StoppedError as stopped:
        raise _stopped(config, str(stopped), stopped.signal) from stopped
    except processes.SignalReceived as received:
        name = processes.signal_name(received.number)
        raise _stopped(config, f"Stopped by {name}.", received.number) from received
    except SystemExit as stopped:  # Lightning's end after Ctrl-C
        raise _stopped(config, "Stopped at once.", signal.SIGINT) from stopped
    except (InputError, RunError) as error:
        from instruct_lm.training.divergence import DivergedError

        if isinstance(error, DivergedError):
            raise RunError(f"{error}\n{_after_divergence(config)}") from error
        if isinstance(error, launch.ProcessError):
            raise RunError(f"{error}\n{_after_failure(config)}") from error
        raise
    except Exception as error:
        if launch.connection_lost(error):
            if processes.is_launched():  # the process that started this one says what has happened
                raise SystemExit(launch.LOST) from error
            raise RunError(f"Another process of this run has ended.\n{_after_failure(config)}") from error
        if (failure := outside_failure(error)) is None:
            raise
        raise RunError(f"{failure}\n{_after_failure(config)}") from error
    finally:
        threading.excepthook, logging.raiseExceptions = excepthook, complain


def _stopped(config: TrainConfig, message: str, number: int) -> StoppedError:
    if not is_begun(config.folder):
        again = command("train.py", resume=config.folder)
        return StoppedError(f"Stopped before the first checkpoint. Start again with: {again}", number)
    return StoppedError(f"{message} Continue with: {command('train.py', resume=config.folder)}", number)


def _after_failure(config: TrainConfig) -> str:
    again = command("train.py", resume=config.folder)
    if not is_begun(config.folder):
        return f"Nothing was saved before it. When that is mended, start again with: {again}"
    from instruct_lm.training.checkpoints import kept

    return f"Kept: {kept(config.folder)}. When that is mended, continue with: {again}"


def _after_divergence(config: TrainConfig) -> str:
    from instruct_lm.training.checkpoints import kept

    remedy = "Lower optimizer.lr, or try trainer.clip_norm=1 and optimizer.warmup_steps=50, in a new run."
    files = kept(config.folder)
    if not files:
        return f"No checkpoint was written before. {remedy}"
    use = f" It can be used: {command('evaluate.py', run=config.folder)}" if (config.folder / BEST).is_file() else ""
    return f"Kept from before: {files}.{use}\n{remedy}"
