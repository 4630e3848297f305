"""Callbacks around the training steps: throughput, sample answers, when to validate, when to give up."""

import logging
import math
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, TQDMProgressBar

from instruct_lm.data.batching import Batch
from instruct_lm.data.prompts import Example
from instruct_lm.errors import RunError
from instruct_lm.model.generation import GREEDY
from instruct_lm.training.memory import memory_now

log = logging.getLogger(__name__)


class Throughput(Callback):
    """Logs ``train/tokens_per_second`` (tokens of the examples, without padding) and ``train/memory_gb``.

    Attributes:
        tokens, seconds: Of all training steps so far, validation and checkpoints not counted.
    """

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0
        self._since = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Say where training begins."""
        log.info("training: from step %d", trainer.global_step)

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the rate of this micro-batch."""
        seconds = time.perf_counter() - self._since
        self.tokens, self.seconds = self.tokens + batch.n_tokens, self.seconds + seconds
        module.log("train/tokens_per_second", batch.n_tokens / seconds, prog_bar=True)
        module.log("train/memory_gb", memory_now(module.device) / 1e9)

    @property
    def summary(self) -> dict[str, float]:
        """Seconds of training steps and the rate over all of them; 0 before the first."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        return {"train_seconds": round(self.seconds, 1), "tokens_per_second": round(rate, 1)}


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar on stderr, without the logger's version, which is always the same here."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The metrics beside the bar."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}

    def init_train_tqdm(self) -> Any:
        """The bar of an epoch; Lightning's goes to stdout, which is for results."""
        with redirect_stdout(sys.stderr):
            return super().init_train_tqdm()

    def init_validation_tqdm(self) -> Any:
        """The bar of a validation."""
        with redirect_stdout(sys.stderr):
            return super().init_validation_tqdm()


class SampleResponses(Callback):
    """Writes the answers to a few fixed instructions to TensorBoard, before training and at each validation.

    Args:
        examples: The instructions, shown beside their reference answers.
        max_new_tokens: Longest answer, in tokens.
    """

    def __init__(self, examples: Sequence[Example], max_new_tokens: int = 32) -> None:
        self.examples, self.max_new_tokens = examples, max_new_tokens

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Answer and log; ``module`` is an `InstructionTuner` with a responder."""
        if not trainer.is_global_zero or trainer.sanity_checking or trainer.logger is None or not self.examples:
            return
        responder = replace(module.responder, max_new_tokens=self.max_new_tokens, sampling=GREEDY)
        rows = ["| instruction | reference | response |", "|---|---|---|"]
        for example, response in zip(self.examples, responder.answer(self.examples), strict=True):
            question = f"{example.instruction} {example.input}".strip()
            rows.append("| " + " | ".join(_cell(text) for text in (question, example.output, response.text)) + " |")
        trainer.logger.experiment.add_text("responses", "\n".join(rows), trainer.global_step)  # type: ignore[attr-defined]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")


class StopIfDiverged(Callback):
    """Ends a run whose loss is NaN or infinite."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Check the latest loss."""
        loss = float(trainer.callback_metrics.get("train/loss", 0.0))
        if not math.isfinite(loss):
            raise RunError(
                f"Training diverged: the loss is {loss} at step {trainer.global_step}. Lower optimizer.lr, or try "
                "trainer.clip_norm=1 and optimizer.warmup_steps=50."
            )


class ValidateEvery(Callback):
    """Validates each ``interval`` epochs, between optimizer steps, and after the last step of all.

    Lightning counts batches from the start of an epoch, and skips a validation that its interval does not divide.

    Example:
        With 9 batches an epoch and ``interval=0.5``, validations follow batch 5 (5 / 9 is the first share ≥ 0.5) and
        batch 9 of each epoch.
    """

    def __init__(self, interval: float) -> None:
        self.interval = interval

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Decide whether a validation follows this batch."""
        batches, accumulated = trainer.num_training_batches, trainer.accumulate_grad_batches
        done, start = batch_idx + 1, batch_idx // accumulated * accumulated  # `start`: of this optimizer step
        # Intervals that are over, before this step and now; 1e-6 makes up for rounding.
        before, now = (int((trainer.current_epoch + n / batches) / self.interval + 1e-6) for n in (start, done))
        last = trainer.global_step >= trainer.estimated_stepping_batches
        due = (done % accumulated == 0 or done == batches) and (now > before or last)
        trainer.val_check_batch = done if due else done + 1  # Lightning validates when this divides `done`
