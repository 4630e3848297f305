"""The LightningModule: one token-weighted loss for every mask, layout and accumulation."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from instruct_lm.data.batching import Batch
from instruct_lm.fast.gradients import forget_gradients, keep_gradients
from instruct_lm.model.gpt import GPT
from instruct_lm.training.loss import linear_cross_entropy
from instruct_lm.training.optimizers import OptimizerSettings, allocate_states


class InstructionTuner(pl.LightningModule):
    """Minimises Σ w · nll / Σ w, the sums over a whole optimizer step: micro-batches and ranks included.

    Logs ``train/loss``, ``train/grad_norm`` and ``train/lr`` each step; ``val/loss`` (the run's own weights) and
    ``val/response_loss`` (response and end token only, comparable between masks), in nats a token over the whole split.

    Args:
        model: maps token ids to logits.
        optimizer: its settings.
        total_steps: optimizer steps that the schedule is for.
        config: plain containers, kept in the checkpoints.
    """

    def __init__(
        self,
        model: GPT,
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008  (frozen)
        total_steps: int = 0,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.strict_loading = all(parameter.requires_grad for parameter in model.parameters())
        self.settings = optimizer
        self.total_steps = total_steps
        self.config = config or {}
        self._rng_states: tuple[Tensor | None, Tensor | None] = (None, None)
        self._keeps_gradients = False
        self._train_sums = torch.zeros(2, dtype=torch.float64)  # Σ w·nll, Σ w of the step under way
        self._val_sums = torch.zeros(4, dtype=torch.float64)  # the same, then for the response alone

    def losses(self, batch: Batch, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """``scale`` · Σ w · nll of a batch, a scalar with gradients, and the nll (M,) of its targets, without."""
        hidden = self.model.hidden_states(batch.input_ids, batch.position_ids, packing=batch.packing)
        hidden = hidden.flatten(0, -2).index_select(0, batch.target_positions)  # (M, C)
        return linear_cross_entropy(hidden, self.model.head_weight, batch.target_ids, batch.target_weights * scale)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The share of this micro-batch in the step's loss.

        Raises:
            ValueError: the step has no weight to divide by.
        """
        weight = float(batch.target_weights.sum())
        step_weight = weight if batch.step_weight is None else batch.step_weight
        if not step_weight > 0:
            raise ValueError(f"no token of this step counts in the loss: entries {list(batch.entries)}")
        share, _ = self.losses(batch, 1 / step_weight)
        self._train_sums += torch.tensor([float(share.detach()) * step_weight, weight], dtype=torch.float64)
        # Lightning divides by the accumulated batches, and DDP by the ranks: the step's own weight has done that.
        return share * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log what the step under way has seen."""
        weighted, weight = self._reduce(self._train_sums).tolist()
        self._train_sums.zero_()
        self.log("train/loss", weighted / weight, prog_bar=True)
        self.log("train/lr", optimizer.param_groups[0]["lr"])
        due = self.trainer.global_step % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if due and not self.settings.in_backward:
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            self.log("train/grad_norm", torch.nn.utils.get_total_norm(grads))

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew."""
        self._val_sums.zero_()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the sums."""
        _, nll = self.losses(batch)
        for i, weights in enumerate((batch.target_weights, batch.response_weights)):
            self._val_sums[2 * i] += float((weights * nll).sum(dtype=torch.float64))
            self._val_sums[2 * i + 1] += float(weights.sum(dtype=torch.float64))

    def on_validation_epoch_end(self) -> None:
        """Log the losses as ratios of sums over the split."""
        weighted, weight, response, count = self._reduce(self._val_sums).tolist()
        self.log("val/loss", weighted / weight, prog_bar=True)
        self.log("val/response_loss", response / count, prog_bar=True)
        self.log("val/perplexity", _perplexity(weighted / weight))
        self.log("val/response_perplexity", _perplexity(response / count))

    def _reduce(self, sums: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return sums
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return self.trainer.strategy.reduce(sums.to(self.device, dtype), reduce_op="sum").cpu()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, and its schedule by optimizer step."""
        # Lightning cannot clip what a fused optimizer unscales itself.
        mixed = str(self.trainer.precision).endswith("mixed")
        optimizer = self.settings.build(self, fused=not (mixed and self.trainer.gradient_clip_val))
        factor = partial(self.settings.factor, total_steps=self.total_steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Begin a step before its first forward pass, which writes the head's gradient already."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            if self._keeps_gradients:
                forget_gradients(self.parameters())
            else:
                self.zero_grad()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Nothing: see `on_train_batch_start`."""

    def on_validation_model_zero_grad(self) -> None:
        """Nothing: the gradients' memory is kept through validation."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained (with a frozen base the adapters alone), the configuration and dropout's state."""
        checkpoint["config"] = self.config
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {name: x for name, x in checkpoint["state_dict"].items() if name in trained}
        checkpoint["rng_state"] = torch.get_rng_state()
        if self.device.type == "cuda":
            checkpoint["cuda_rng_state"] = torch.cuda.get_rng_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the random numbers' state for the first step."""
        self._rng_states = checkpoint.get("rng_state"), checkpoint.get("cuda_rng_state")

    def on_train_start(self) -> None:
        """Go on with the random numbers of the checkpoint, and keep gradients in place where memory traffic is slow."""
        self._keeps_gradients = (
            self.device.type == "cpu" and self.trainer.world_size == 1 and self.trainer.precision == "32-true"
        )
        if self._keeps_gradients:
            keep_gradients(self.model.wte if self.settings.in_backward else self.model)
            allocate_states(self.optimizers(use_pl_optimizer=False))  # type: ignore[arg-type]
        cpu_state, cuda_state = self._rng_states
        if cpu_state is not None:
            torch.set_rng_state(cpu_state)
        if cuda_state is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(cuda_state, self.device)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch, which is a frozen dataclass."""
        return batch.to(device)


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # exp(710) is beyond a float
