"""When checkpoints are written: the best weights after a validation, the whole state between two optimizer steps."""

import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from instruct_lm.data.batching import Batch
from instruct_lm.errors import InputError, StoppedError
from instruct_lm.io.files import clear_parts
from instruct_lm.training.checkpoints import load_checkpoint
from instruct_lm.training.signals import StopSignals

log = logging.getLogger(__name__)


class SaveBest(Callback):
    """Keeps the weights with the lowest ``val/response_loss``, also when a run is moved and then resumed.

    Args:
        path: Of the checkpoint.

    Attributes:
        value: The lowest loss so far; infinite before the first validation. Checkpoints keep it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.value = math.inf

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Forget a best value whose weights are lost: the next validation then gives new ones."""
        if self.value < math.inf:
            try:
                load_checkpoint(self.path)
            except InputError as error:
                log.warning("%s\nThe next validation gives new best weights, better or worse than those.", error)
                self.value = math.inf

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save the weights if they are the best so far."""
        value = float(trainer.callback_metrics.get("val/response_loss", math.inf))
        if trainer.global_step and value < self.value:
            self.value = value
            trainer.save_checkpoint(self.path, weights_only=True)

    def state_dict(self) -> dict[str, Any]:
        """The best value."""
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best value."""
        self.value = state_dict["value"]


class SaveLast(Callback):
    """Keeps a checkpoint with all that a resume needs, and the one before it.

    A checkpoint is written when an optimizer step with all that belongs to it is done: its values are logged, the
    validation after it is over. So a resumed run repeats nothing that a checkpoint holds and leaves nothing out. This
    is so before the first micro-batch of the next step, which Lightning has begun to count, and at the end of an epoch.
    `between_steps` makes both the same for Lightning.

    Args:
        path: Of the checkpoint.
        previous: Where the one before is kept.
        signals: Their first ends training with a checkpoint after the step under way.
        steps: Optimizer steps after which a checkpoint is due; None: by the clock alone.
        minutes: Time after which one is due.
    """

    def __init__(
        self, path: Path, previous: Path, signals: StopSignals, steps: int | None = None, minutes: float = 10.0
    ) -> None:
        self.path, self.previous = path, previous
        self.signals = signals
        self.steps, self.minutes = steps, minutes
        self._batches: int | None = None  # done in this epoch, while a checkpoint is made

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock, and tell Lightning where it is."""
        self._note(trainer)
        # The file before last was good where last was not: the next one replaces last, and last becomes nothing.
        self._last_is_good = trainer.ckpt_path is None or Path(trainer.ckpt_path) != self.previous
        clear_parts(self.path.parent)
        loop = trainer.fit_loop.epoch_loop
        if loop.batch_progress.current.ready == 0:  # a new epoch, which Lightning resumes in its middle given max_steps
            loop.restarting = False

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Batch, batch_idx: int) -> None:
        """Save if a checkpoint is due and the last step is over."""
        if batch_idx == 0 or batch_idx % trainer.accumulate_grad_batches:
            return
        due = self.signals.requested is not None or time.monotonic() - self._saved_at >= 60 * self.minutes
        due = due or (self.steps is not None and trainer.global_step - self._saved_step >= self.steps)
        if trainer.strategy.reduce_boolean_decision(due, all=False):  # the clocks of several processes differ
            self._save(trainer, batch_idx)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save after each epoch, and after the last step."""
        self._save(trainer, trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def _save(self, trainer: pl.Trainer, batches: int) -> None:
        if trainer.global_step > self._saved_step:
            self._batches = batches
            new = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
            trainer.save_checkpoint(new)
            self._batches = None
            if trainer.is_global_zero:
                if self.path.exists() and self._last_is_good:
                    self.path.replace(self.previous)
                new.replace(self.path)
            self._last_is_good = True
        self._note(trainer)
        if self.signals.requested:
            raise StoppedError(f"Stopped after step {trainer.global_step}.", self.signals.requested)

    def _note(self, trainer: pl.Trainer) -> None:
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Correct Lightning's record of where it is."""
        if self._batches is not None:
            between_steps(checkpoint["loops"]["fit_loop"], trainer, self._batches)


def between_steps(loop: dict[str, Any], trainer: pl.Trainer, batches: int) -> None:
    """Correct the state of Lightning's fit loop: so many batches of this epoch are done, and nothing is under way.

    In the middle of an epoch the state is that of Lightning's own checkpoints in `on_train_batch_end`, from which it
    goes on with the next batch. After the last batch of an epoch it is that of an epoch that has not begun.

    Args:
        loop: Its `state_dict`; changed in place.
        trainer: The trainer.
        batches: Number of micro-batches done, which complete an optimizer step.
    """
    epoch, whole = trainer.current_epoch, int(trainer.num_training_batches)
    epoch, batches = divmod(epoch * whole + batches, whole)
    middle = int(batches > 0)  # Lightning completes a batch, and counts a step, when it resumes in the middle
    for count in ("total", "current"):
        loop["epoch_progress"][count] |= {"ready": epoch + middle, "started": epoch + middle}
        loop["epoch_progress"][count] |= {"processed": epoch, "completed": epoch}
        done = batches if count == "current" else epoch * whole + batches
        loop["epoch_loop.batch_progress"][count] |= {"ready": done, "started": done, "processed": done}
        loop["epoch_loop.batch_progress"][count]["completed"] = done - middle
    loop["epoch_loop.batch_progress"]["is_last_batch"] = False
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = trainer.global_step - middle
    loaders = loop["state_dict"].get("combined_loader", [])
    loop["state_dict"]["combined_loader"] = [{"steps": batches // trainer.accumulate_grad_batches} for _ in loaders]
