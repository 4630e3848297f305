"""Callbacks around the training steps: throughput, sample answers, when to validate and when to stop."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, EarlyStopping

from instruct_lm.data.batching import Batch
from instruct_lm.data.conversation import Conversation
from instruct_lm.model.generation import GREEDY
from instruct_lm.training.memory import peak_memory
from instruct_lm.training.progress import saying
from instruct_lm.training.strategies import is_sharded

log = logging.getLogger(__name__)


class Throughput(Callback):
    """Logs ``train/tokens_seen``, ``train/tokens_per_second`` (both without padding) and ``train/memory_gb``.

    Args:
        started: When the command began, by `time.perf_counter`.
        memory: Whether the peak is this run's own; else it is not logged.

    Attributes:
        tokens, seconds: Of all training steps so far, those before a resume included; validation and checkpoints do not
            count.
        earlier: Seconds that earlier commands of the run took until the checkpoint.
    """

    def __init__(self, started: float, memory: bool = True) -> None:
        self.started, self.memory = started, memory
        self.tokens, self.seconds, self.earlier = 0, 0.0, 0.0

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
        module.log("train/tokens_seen", float(self.tokens))
        if self.memory:
            module.log("train/memory_gb", peak_memory(module.device) / 1e9)

    def summary(self) -> dict[str, float]:
        """The totals in figures of a run's summary."""
        rate = self.tokens / max(self.seconds, 1e-9)
        seconds = {"seconds": round(self._elapsed(), 1), "train_seconds": round(self.seconds, 1)}
        return seconds | {"tokens_per_second": round(rate, 1)}

    def state_dict(self) -> dict[str, Any]:
        """The totals."""
        return {"tokens": self.tokens, "seconds": self.seconds, "elapsed": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the totals of a checkpoint."""
        self.tokens, self.seconds = state_dict["tokens"], state_dict["seconds"]
        self.earlier = state_dict.get("elapsed", self.seconds)  # older checkpoints lack it

    def _elapsed(self) -> float:
        return self.earlier + time.perf_counter() - self.started


class Patience(EarlyStopping):
    """Ends training after so many validations in a row without a better ``val/response_loss``.

    Args:
        validations: The number.
    """

    def __init__(self, validations: int) -> None:
        super().__init__("val/response_loss", patience=validations, check_on_train_epoch_end=False)

    @property
    def is_over(self) -> bool:
        """Whether there have been so many."""
        return self.wait_count >= self.patience

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the count, but not the patience: a resumed run may have more."""
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Stop a run at once that ended here already."""
        trainer.should_stop = trainer.should_stop or self.is_over


class SampleResponses(Callback):
    """Writes short answers to a few fixed instructions to TensorBoard, before training and at each validation.

    Args:
        examples: The instructions, shown beside their reference answers.
    """

    def __init__(self, examples: Sequence[Conversation]) -> None:
        self.examples = examples

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Answer and log; ``module`` is an `InstructionTuner` with a responder."""
        if trainer.sanity_checking or trainer.logger is None or not self.examples:
            return
        if not trainer.is_global_zero and not is_sharded(module):
            return  # the first process answers alone, unless it holds only a part of the model
        responder = replace(module.responder, max_new_tokens=32, sampling=GREEDY)
        rows = ["| instruction | reference | response |", "|---|---|---|"]
        with saying(trainer, "answering"):
            responses = responder.answer(self.examples)
        for example, response in zip(self.examples, responses, strict=True):
            question = " ".join(text for turn in example.prompt for text in (turn.text, turn.input) if text)
            texts = (question, example.reference, response.text)
            cells = [text.replace("|", "\\|").replace("\n", "<br>") for text in texts]
            rows.append(f"| {' | '.join(cells)} |")
        if trainer.is_global_zero:
            step = max(trainer.global_step - 1, 0)  # Lightning counts the steps of its curves from 0
            trainer.logger.experiment.add_text("responses", "\n".join(rows), step)  # type: ignore[attr-defined]


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
        done = batch_idx + 1
        # Intervals that are over, before this step and now; 1e-6 makes up for rounding. Steps are counted, whose number
        # is the same for any number of processes.
        steps, step = -(-batches // accumulated), batch_idx // accumulated
        before, now = (int((trainer.current_epoch + n / steps) / self.interval + 1e-6) for n in (step, step + 1))
        last = trainer.global_step >= trainer.estimated_stepping_batches
        due = (done % accumulated == 0 or done == batches) and (now > before or last)
        trainer.val_check_batch = done if due else done + 1  # Lightning validates when this divides `done`
