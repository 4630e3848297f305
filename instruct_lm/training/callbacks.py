"""What happens around the steps: answers while training, throughput and memory, checkpoints that survive anything."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import psutil
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from tqdm import tqdm

from instruct_lm.data.batching import Batch
from instruct_lm.data.prompts import Example
from instruct_lm.errors import RunError

log = logging.getLogger(__name__)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by the process (resident set) on a CPU, by torch on an accelerator."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(accelerator: str) -> int:
    """Bytes that a run could still take: of the first GPU, or of the machine."""
    if accelerator == "gpu":
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def memory_now(device: torch.device) -> int:
    """Bytes held now, measured like `peak_memory`."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


class Throughput(Callback):
    """Logs ``train/tokens_per_second`` (tokens of the examples, without padding) and ``train/memory_gb``."""

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0
        self._since = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Say that the first step begins."""
        log.info("training: from step %d", trainer.global_step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Start the clock of a step; validation and checkpoints between steps do not count."""
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Log the rate of this micro-batch."""
        seconds = time.perf_counter() - self._since
        self.tokens, self.seconds = self.tokens + batch.n_tokens, self.seconds + seconds
        module.log("train/tokens_per_second", batch.n_tokens / seconds)
        module.log("train/memory_gb", memory_now(module.device) / 1e9)

    @property
    def tokens_per_second(self) -> float:
        """The rate over all steps so far; 0 before the first."""
        return self.tokens / self.seconds if self.seconds else 0.0


class ProgressBar(Callback):
    """A bar of optimizer steps with the losses and tokens per second, and one of batches while validating.

    Args:
        throughput: a callback that comes before this one.
    """

    def __init__(self, throughput: Throughput) -> None:
        self.throughput = throughput
        self._bars: list[tqdm] = []

    def _open(self, trainer: pl.Trainer, **options: Any) -> None:
        self._bars.append(tqdm(mininterval=0.2, dynamic_ncols=True, disable=not trainer.is_global_zero, **options))

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin at the step that a resume begins at."""
        total: int = module.total_steps  # type: ignore[assignment]
        self._open(trainer, total=total, initial=trainer.global_step, desc="training", unit="step")

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Show the latest losses."""
        names = {"train/loss": "loss", "val/loss": "validation"}
        metrics = trainer.callback_metrics
        shown = [f"{name} {float(metrics[key]):.3f}" for key, name in names.items() if key in metrics]
        bar = self._bars[0]
        bar.set_postfix_str(", ".join([*shown, f"{self.throughput.tokens_per_second:,.0f} tokens/s"]), refresh=False)
        bar.update(trainer.global_step - bar.n)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Show a second bar, which goes when it is full."""
        self._open(trainer, total=int(sum(trainer.num_val_batches)), desc="validating", unit="batch", leave=False)

    def on_validation_batch_end(self, *_: Any) -> None:
        """Count a batch."""
        self._bars[-1].update()

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Close the second bar."""
        self._bars.pop().close()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the bars as they stand."""
        self._close()

    def _close(self) -> None:
        while self._bars:
            self._bars.pop().close()


class SampleResponses(Callback):
    """Writes the answers to a few fixed instructions to TensorBoard, before training and at each validation.

    Args:
        examples: the instructions, shown beside their reference answers.
        answer: makes the answers of the current model.
    """

    def __init__(self, examples: Sequence[Example], answer: Callable[[Sequence[Example]], list[str]]) -> None:
        self.examples, self.answer = examples, answer

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Answer and log."""
        if not trainer.is_global_zero or trainer.sanity_checking or trainer.logger is None or not self.examples:
            return
        rows = ["| instruction | reference | response |", "|---|---|---|"]
        for example, response in zip(self.examples, self.answer(self.examples), strict=True):
            question = f"{example.instruction} {example.input}".strip()
            rows.append("| " + " | ".join(_cell(text) for text in (question, example.output, response)) + " |")
        trainer.logger.experiment.add_text("responses", "\n".join(rows), trainer.global_step)  # type: ignore[attr-defined]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")


class StopIfDiverged(Callback):
    """Ends a run whose loss is no number any more: nothing after it would mean anything."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Look at the latest loss."""
        loss = float(trainer.callback_metrics.get("train/loss", 0.0))
        if not math.isfinite(loss):
            raise RunError(
                f"Training diverged: the loss is {loss} at step {trainer.global_step}. Lower optimizer.lr, or try "
                "trainer.clip_norm=1 and optimizer.warmup_steps=50."
            )


class ValidateEvery(Callback):
    """Validates each ``interval`` epochs, between optimizer steps, and after the last step of all.

    Lightning counts from the start of an epoch and leaves out what its interval does not divide.
    """

    def __init__(self, interval: float) -> None:
        self.interval = interval

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Decide whether a validation follows."""
        batches, accumulated = trainer.num_training_batches, trainer.accumulate_grad_batches
        done, start = batch_idx + 1, batch_idx // accumulated * accumulated  # `start`: of this optimizer step
        now, then = (int((trainer.current_epoch + n / batches) / self.interval + 1e-6) for n in (done, start))
        last = trainer.global_step >= module.total_steps  # type: ignore[operator]
        due = (done % accumulated == 0 or done == batches) and (now > then or last)
        trainer.val_check_batch = done if due else done + 1  # due: it divides the batches done


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there: a reader sees the old file or the new one, never a part.

    Lightning's own writer fills a buffer in memory first, which doubles the size of the run.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write, sync and move."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


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

    The first SIGINT (Ctrl-C) or SIGTERM ends training with a checkpoint after the step under way, a second one at once.

    Args:
        path: of the checkpoint.
        every_seconds: longest time between checkpoints.
    """

    def __init__(self, path: Path, every_seconds: float = 600.0) -> None:
        self.path, self.every_seconds = path, every_seconds
        self.stop_requested = False
        self._postponed = False
        self._saved_at = time.monotonic()
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take over the signals."""
        self._saved_at = time.monotonic()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._request_stop)

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self.stop_requested = True
        self._restore()
        print("\nStopping after this step with a checkpoint; once more to stop at once.", file=sys.stderr)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Save between optimizer steps; a step later where a validation follows, which a resume would leave out."""
        done = batch_idx + 1
        between_steps = done % trainer.accumulate_grad_batches == 0 and done < trainer.num_training_batches
        due = self.stop_requested or time.monotonic() - self._saved_at >= self.every_seconds
        if not (due and between_steps):
            return
        if done % trainer.val_check_batch == 0 and not self._postponed:  # type: ignore[operator]
            self._postponed = True
        else:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save after each epoch."""
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved_at, self._postponed = time.monotonic(), False
        if self.stop_requested:
            raise KeyboardInterrupt

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._restore()
