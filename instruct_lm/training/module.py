"""The LightningModule: one token-weighted loss for every mask, batch size and accumulation."""

import logging
import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from instruct_lm.data.batching import Batch
from instruct_lm.data.conversation import Conversation
from instruct_lm.data.prompts import get_style
from instruct_lm.data.tokenizer import Tokenizer, load_tokenizer
from instruct_lm.errors import InputError
from instruct_lm.io.conf_files import model_config
from instruct_lm.io.fetcher import Fetcher
from instruct_lm.model.description import complete
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.model.pretrained import load_pretrained
from instruct_lm.respond import Responder, Response
from instruct_lm.training.loss import batch_loss
from instruct_lm.training.optimizers import ADAMW, OptimizerSettings
from instruct_lm.training.strategies import FullyShardedStrategy, keep_steps, shard, steps_of, whole

log = logging.getLogger(__name__)

TOTAL_STEPS = "total_steps"
"""The key of a checkpoint that holds the number of optimizer steps that the run was to have."""


class InstructionTuner(pl.LightningModule):
    """Minimises Σ w · nll / Σ w, the sums over a whole optimizer step: micro-batches and processes included.

    Logs ``train/loss``, ``train/grad_norm`` and ``train/lr`` each step; ``val/loss`` (the run's own weights) and
    ``val/response_loss`` (response and end token only, comparable between masks), in nats per token over the whole
    split, and both as perplexities; the same as ``test/…`` with `Trainer.test`. `Trainer.predict` gives answers.

    Args:
        model: Maps token ids to logits.
        responder: The same model with its tokenizer and prompt style; needed for answers alone.
        optimizer: Its settings.
        seed: Of the random numbers of training (dropout).

    Attributes:
        loss: `instruct_lm.training.loss.batch_loss`; `instruct_lm.fast` puts a faster function of the same values here.
    """

    def __init__(
        self, model: GPT, responder: Responder | None = None, optimizer: OptimizerSettings = ADAMW, seed: int = 123
    ) -> None:
        super().__init__()
        self.model = model
        self.responder = responder
        self.settings = optimizer
        self.seed = seed
        self.loss: Callable[[GPT, Batch], tuple[Tensor, Tensor]] = batch_loss
        self._total_steps: float | None = None  # as a checkpoint has it
        self._sums: list[Tensor] = []  # of each batch of the evaluation under way, as in `_batch_sums`
        self._train_sums: list[Tensor] = []  # of each micro-batch of the optimizer step under way

    @classmethod
    def from_pretrained(
        cls, name: str, *, style: str = "alpaca", max_new_tokens: int = 256, optimizer: OptimizerSettings = ADAMW
    ) -> "InstructionTuner":
        """A pretrained model, downloaded at its first use, with its tokenizer.

        Args:
            name: A file in `conf/model/`, such as ``smollm2-135m``.
            style: The prompt style: ``alpaca``, ``phi3`` or ``chatml``.
            max_new_tokens: Longest answer, in tokens.
            optimizer: Its settings.

        Raises:
            InputError: There is no such model or style.
            DownloadError: The files cannot be fetched.
        """
        settings, fetcher = model_config(name), Fetcher()
        if settings.weights is not None:
            weights = fetcher.fetch(settings.weights, sha256=settings.weights_sha256)
            settings = settings if settings.is_complete else complete(settings, weights)
        tokenizer = load_tokenizer(fetcher.fetch(str(settings.tokenizer), sha256=settings.tokenizer_sha256))
        if settings.weights is None:
            model = GPT(GPTConfig.of(settings))
        else:
            model = load_pretrained(GPTConfig.of(settings), weights)
        return cls(model, Responder(model, tokenizer, get_style(style, tokenizer), max_new_tokens), optimizer)

    @property  # type: ignore[misc]  # Lightning's own can be set
    def strict_loading(self) -> bool:
        """Whether a checkpoint must hold all parameters; with a frozen base it holds the trained ones alone."""
        return all(parameter.requires_grad for parameter in self.parameters())

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            ValueError: The tuner has no responder.
        """
        return self._responder().tokenizer

    def answer(self, instruction: str, input: str = "") -> str:
        """Answer one instruction with the weights as they are now."""
        return self._responder().answer([Conversation.of(instruction, input)])[0].text

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The share of this micro-batch in the step's loss.

        Raises:
            ValueError: The step has no weight to divide by.
        """
        weighted, response = self.loss(self.model, batch)
        self._train_sums.append(_batch_sums(batch, weighted, response))
        step_weight = batch.step_weight if batch.step_weight is not None else float(batch.weights.sum())
        if not step_weight > 0:
            raise ValueError(f"no token of this step counts in the loss: entries {list(batch.entries)}")
        # Lightning divides by the accumulated batches, and DDP by the processes: the step's weight has done that.
        return weighted / step_weight * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Note a batch's part of the sums over the split."""
        self._sums.append(_batch_sums(batch, *self.loss(self.model, batch)))

    test_step = validation_step

    def predict_step(self, batch: list[Conversation], batch_idx: int) -> list[Response]:
        """Answer the entries of a batch."""
        return self._responder().answer(batch)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Free the last step's gradients before the forward pass, and seed the random numbers of this micro-batch.

        They depend on seed, epoch, micro-batch and process alone. So a resumed run drops out what an uninterrupted one
        does, whatever else has drawn random numbers, and no checkpoint needs their states.
        """
        seeds = np.random.SeedSequence((self.seed, self.trainer.current_epoch, batch_idx, self.trainer.global_rank))
        seed_everything(int(seeds.generate_state(1)[0]), verbose=False)
        # Lightning would hold the gradients until after the forward pass.
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.zero_grad()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the loss of the step under way."""
        weighted, weight, _, _ = self._reduced(self._train_sums)
        self._train_sums.clear()
        self._log("train/loss", weighted / weight, prog_bar=True)
        self._log("train/lr", optimizer.param_groups[0]["lr"])
        due = self.trainer.global_step % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if due and not self.settings.in_backward:
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            self.log("train/grad_norm", whole(torch.nn.utils.get_total_norm(grads)))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of all gradients.

        Lightning's own refuses a fused optimizer in all mixed precisions, though gradients of bf16 are never scaled.
        """
        if gradient_clip_val:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def on_validation_start(self) -> None:
        """Free the last step's gradients: a validation is never in the middle of one."""
        self.zero_grad()

    def on_validation_epoch_end(self) -> None:
        """Log the losses of the split."""
        split = "test" if self.trainer.testing else "val"
        weighted, weight, response, count = self._reduced(self._sums)
        self._sums.clear()
        for name, loss in (("", weighted / weight), ("response_", response / count)):
            self._log(f"{split}/{name}loss", loss, prog_bar=split == "val")
            self._log(f"{split}/{name}perplexity", math.exp(loss) if loss < 700 else math.inf)  # e^710 is no float

    on_test_epoch_end = on_validation_epoch_end

    def _log(self, name: str, value: float, **options: Any) -> None:
        """Log a number of the host as such: Lightning would put it on the device and fetch it again, waiting twice."""
        self.log(name, torch.tensor(value), **options)

    def _reduced(self, parts: list[Tensor]) -> list[float]:
        """The sums over batches and processes; the device is waited for here, and not once for each batch."""
        sums = torch.stack(parts).cpu().double().sum(0)
        if self.trainer.world_size > 1:
            dtype = torch.float32 if self.device.type == "mps" else torch.float64
            sums = self.trainer.strategy.reduce(sums.to(self.device, dtype), reduce_op="sum")
        return sums.tolist()

    def _responder(self) -> Responder:
        if self.responder is None:
            raise ValueError("this tuner cannot answer: give InstructionTuner a responder, or use from_pretrained")
        return self.responder

    def configure_model(self) -> None:
        """Share the model among the processes if the strategy does."""
        if isinstance(self.trainer.strategy, FullyShardedStrategy):
            shard(self.model, self.trainer.strategy.device_mesh["data_parallel"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, and its schedule by optimizer step.

        Raises:
            InputError: The precision does not go with the optimizer.
        """
        precision = str(self.trainer.precision)
        if precision == "16-mixed" and self.settings.in_backward:
            raise InputError(
                "optimizer.in_backward=true updates a matrix before the scaled gradients of 16-mixed are checked: use "
                "device.precision=32-true (or bf16-mixed on a GPU that has it), or optimizer.in_backward=false."
            )
        # A fused optimizer unscales the gradients of 16-mixed in its own step: too late to log them or to clip them.
        optimizer = self.settings.build(self, fused=precision != "16-mixed")

        def factor(step: int) -> float:
            # The total makes no difference to step 0. To ask for it that early would make Lightning load the data
            # before a resume has restored the place in them.
            return self.settings.factor(step, self.trainer.estimated_stepping_batches if step else math.inf)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Set the rate of the next step: a resumed run may be longer or shorter than its checkpoint was to be."""
        scheduler: Any = self.lr_schedulers()
        step, total = self.trainer.global_step, self.trainer.estimated_stepping_batches
        rates = [base * self.settings.factor(step, total) for base in scheduler.base_lrs]
        groups = scheduler.optimizer.param_groups
        if step and rates[0] != (before := groups[0]["lr"]):
            log.info(
                "optimizer.schedule=%s now ends at step %d instead of %s: the learning rate of the next step is %.3g "
                "instead of %.3g",
                *(self.settings.schedule, total, self._total_steps, rates[0], before),
            )
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note how long the run was to be, and go on with the same optimizer steps on any number of processes."""
        self._total_steps = checkpoint.get(TOTAL_STEPS)
        keep_steps(self.trainer, checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained parameters, with a frozen base the adapters alone, and how long the run is to be."""
        checkpoint[TOTAL_STEPS] = self._total_steps = self.trainer.estimated_stepping_batches
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {name: x for name, x in checkpoint["state_dict"].items() if name in trained}
        checkpoint["steps"] = steps_of(self.trainer)


def _batch_sums(batch: Batch, weighted: Tensor, response: Tensor) -> Tensor:
    """Σ w · nll and Σ w, then the same two of the responses alone: float32 (4,), on the batch's device."""
    return torch.stack((weighted.detach(), batch.weights.sum(), response, batch.response_weights.sum()))
