"""Signals that ask a training to stop: noted when they come, acted on where a checkpoint can be written."""

import signal
import sys
from contextlib import ExitStack
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
"""Ctrl-C, the end of a job, of a terminal, and a scheduler's warning; Windows lacks the last two."""


class StopSignals(Callback):
    """Notes the first of `SIGNALS` that comes while a run trains; a second one then acts as it always does.

    Attributes:
        requested: Its number; None until then.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._handlers = ExitStack()  # closing it restores the old ones

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take over the signals."""
        for number in SIGNALS:
            self._handlers.callback(signal.signal, number, signal.signal(number, self._request))

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = number
        self._handlers.close()
        print("\nStopping after this step with a checkpoint; once more to stop at once.", file=sys.stderr)

    def teardown(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        """Give the signals back."""
        self._handlers.close()
