"""Checkpoints: written atomically, the best weights and the last state kept, and a signal to stop answered by one."""

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from instruct_lm.data.batching import Batch
from instruct_lm.errors import StoppedError
from instruct_lm.io.files import replacing
from instruct_lm.training.signals import StopSignals
from instruct_lm.training.strategies import largest

SAVE_INTERVAL = 600.0  # seconds


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint atomically: a reader sees the old file or the new one, never a part.

    Lightning's own writer fills a buffer in memory first, which doubles the memory that the run takes.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write beside the path, sync to disk, then move into place."""
        with replacing(Path(path)) as part:
            torch.save(checkpoint, part)


class SaveBest(ModelCheckpoint):
    """Keeps the weights with the lowest ``val/response_loss``, also when a run is moved and then resumed."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            path.parent,
            filename=path.stem,
            monitor="val/response_loss",
            save_weights_only=True,
            save_on_train_epoch_end=False,  # but after each validation
            enable_version_counter=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best value; Lightning would forget it with a new folder."""
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})


class SaveLast(Callback):
    """Keeps a checkpoint with all that a resume needs: after each epoch, every few minutes, and when asked to stop.

    Args:
        path: Of the checkpoint.
        signals: Their first ends training with a checkpoint after the step under way.
    """

    def __init__(self, path: Path, signals: StopSignals) -> None:
        self.path = path
        self.signals = signals
        self._postponed = False

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock."""
        self._saved_at = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Save between optimizer steps; a step later where a validation follows, which a resume would leave out."""
        done = batch_idx + 1
        between_steps = done % trainer.accumulate_grad_batches == 0 and done < trainer.num_training_batches
        if not between_steps:
            return
        # The processes' clocks differ, and all of them must save together.
        due = self.signals.requested or largest(trainer, time.monotonic() - self._saved_at >= SAVE_INTERVAL)
        if due:
            self._postponed = done % trainer.val_check_batch == 0 and not self._postponed  # type: ignore[operator]
            if not self._postponed:
                self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save after each epoch."""
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved_at, self._postponed = time.monotonic(), False
        if self.signals.requested:
            raise StoppedError(f"Stopped after step {trainer.global_step}.", self.signals.requested)
