"""Signals that ask a training to stop: noted when they come, acted on where a checkpoint can be written."""

import signal
import sys
from contextlib import ExitStack
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from instruct_lm.errors import StoppedError
from instruct_lm.io import processes
from instruct_lm.training.strategies import largest


class StopSignals(Callback):
    """Notes the first of `SIGNALS` that comes while a run trains; a second one ends the process at once.

    With several processes it is enough that one of them is told: between optimizer steps all agree.

    Attributes:
        requested: The number of the signal that all processes know of; None until then.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._received = 0
        self._handlers = ExitStack()  # closing it restores the old ones

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take over the signals."""
        for number in processes.SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers.callback(signal.signal, number, signal.signal(number, self._request))

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Agree with the other processes, once an optimizer step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or batch_idx + 1 == trainer.num_training_batches:
            self._agree(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Agree after the validation that may have come last."""
        self._agree(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Give the signals back, and end as after any other step if one came while the last one was saved.

        Raises:
            StoppedError: One did.
        """
        self._handlers.close()
        self._agree(trainer)
        if self.requested:
            raise StoppedError(f"Stopped after step {trainer.global_step}, the last.", self.requested)

    def _agree(self, trainer: pl.Trainer) -> None:
        self.requested = largest(trainer, self._received) or None

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number
        # What has started several processes passes each signal on; so one told twice must not end at once.
        if not processes.is_launched():
            self._handlers.close()
        if processes.rank() == 0:
            print("\nStopping after this step with a checkpoint; once more to stop at once.", file=sys.stderr)

    def teardown(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        """Give the signals back, also after an error."""
        self._handlers.close()
