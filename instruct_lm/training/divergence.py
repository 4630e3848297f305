"""Divergence: judged by every loss and by the weights, so that a run ends before a ruined state is kept."""

import logging
import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from instruct_lm.data.batching import Batch
from instruct_lm.errors import RunError, listing
from instruct_lm.training.module import InstructionTuner

log = logging.getLogger(__name__)


class DivergedError(RunError):
    """The losses or the weights of a run are no longer of use."""


class Divergence(Callback):
    """Ends a run with a `DivergedError` when a loss or a weight is not finite, or a loss has exploded.

    A loss has exploded when it is above twice the larger of ln(vocab_size), the loss of a model that knows nothing, and
    the validation loss before training. It stands before the callbacks that save: they never see such a state.

    Attributes:
        before: The validation losses before training, as `Trainer.validate` gives them.
        after, after_step: Those of the last validation, and the step after which it was; checkpoints keep all three.

    Example:
        With 50,257 tokens, ln(vocab_size) is 10.8, and a run whose loss was 3.8 before training diverges above 21.6.
    """

    def __init__(self) -> None:
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.after_step = 0
        self._entries: list[int] = []  # of the optimizer step under way

    def validate_before(self, trainer: pl.Trainer, module: InstructionTuner, data: pl.LightningDataModule) -> None:
        """Measure the validation losses before the first step.

        Raises:
            DivergedError: They are not finite.
        """
        if trainer.progress_bar_callback is None:  # which says so itself
            log.info("validating before the first step")
        self.before = dict(trainer.validate(module, data, verbose=False)[0])
        log.info("before training: validation loss %(val/loss).3f, response only %(val/response_loss).3f", self.before)
        for name in ("val/loss", "val/response_loss"):
            if not math.isfinite(self.before[name]):
                raise DivergedError(f"The weights are unusable: {name} is {self.before[name]} before the first step.")

    def bound(self, module: InstructionTuner) -> float:
        """The largest loss that is no explosion, in nats per token."""
        before = [loss for name, loss in self.before.items() if name.endswith("loss")]
        return 2 * max(math.log(module.model.config.vocab_size), *before, 0.0)

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Batch, batch_idx: int) -> None:
        """Note the entries of the step."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._entries = []
        self._entries.extend(batch.entries)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Judge the loss of the step."""
        self._judge(trainer, module, "train/loss")

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Judge the losses of the split, and the weights."""
        if trainer.global_step:
            self._judge(trainer, module, "val/loss", "val/response_loss")
            self._judge_weights(trainer, module)
            values = trainer.callback_metrics
            self.after = {name: float(value) for name, value in values.items() if name.startswith("val/")}
            self.after_step = trainer.global_step

    def on_save_checkpoint(self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Judge the weights that a checkpoint is to keep."""
        self._judge_weights(trainer, module)

    def _judge(self, trainer: pl.Trainer, module: InstructionTuner, *names: str) -> None:
        bound, values = self.bound(module), trainer.callback_metrics
        for name in names:
            if name in values and not (loss := float(values[name])) <= bound:
                above = f", above {bound:.3g}: twice that before training or of a blind guess"
                self._fail(trainer, f"{name} is {loss:.4g}" + (above if math.isfinite(loss) else ""))

    def _judge_weights(self, trainer: pl.Trainer, module: InstructionTuner) -> None:
        weights = [getattr(p, "_local_tensor", p).detach() for p in module.parameters() if p.requires_grad]
        largest = torch.nn.utils.get_total_norm(weights, math.inf)
        if trainer.strategy.reduce_boolean_decision(not bool(torch.isfinite(largest)), all=False):
            self._fail(trainer, "weights are no longer finite")

    def _fail(self, trainer: pl.Trainer, what: str) -> None:
        parts: list[list[int]] = [self._entries]
        if trainer.world_size > 1:  # all processes come here, since they judge the same numbers
            parts = parts * trainer.world_size
            torch.distributed.all_gather_object(parts, self._entries)
        entries = ", ".join(listing([str(entry) for part in parts for entry in part], most=32))
        raise DivergedError(f"Training diverged at step {trainer.global_step}: {what}. The step's entries: {entries}.")

    def state_dict(self) -> dict[str, Any]:
        """The validation losses."""
        return {"before": self.before, "after": self.after, "after_step": self.after_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over."""
        self.before, self.after, self.after_step = (state_dict[key] for key in ("before", "after", "after_step"))
