"""Lightning's trainer with this project's callbacks, and a run's settings and metrics for TensorBoard's HParams."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from instruct_lm.config import TrainConfig
from instruct_lm.io.run_files import BEST, LAST
from instruct_lm.training.callbacks import ProgressBar, StopIfDiverged, ValidateEvery
from instruct_lm.training.checkpoints import AtomicCheckpointIO, SaveBest, SaveLast

TEST_METRICS = ("test/score", "test/exact_match", "test/chrf")
"""What HParams compares a sweep by, besides the final losses; an evaluation writes them."""

_HARMLESS = (
    ".*LeafSpec.*deprecated.*",  # Lightning 2.6 with torch 2.13
    ".*does not have many workers.*",
    ".*smaller than the logging interval.*",
    ".*Checkpoint directory.*exists and is not empty.*",
)


def default_precision(accelerator: str) -> Literal["32-true", "bf16-mixed", "16-mixed"]:
    """The precision of a device: bf16 where a GPU has it, else 16-bit there, and fp32 elsewhere."""
    if accelerator != "gpu":
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def make_trainer(config: TrainConfig, accelerator: str, callbacks: Sequence[Callback]) -> pl.Trainer:
    """Make the trainer of a run, which writes TensorBoard events, `checkpoints/last.ckpt` and `checkpoints/best.ckpt`.

    Args:
        config: The run's configuration.
        accelerator: ``cpu``, ``gpu`` or ``mps``.
        callbacks: Callbacks besides those for progress, divergence, validation and checkpoints; they come first.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in _HARMLESS:
        warnings.filterwarnings("ignore", message)
    settings, device, folder = config.trainer, config.device, config.folder
    own = [StopIfDiverged(), ValidateEvery(settings.val_interval), SaveLast(folder / LAST), SaveBest(folder / BEST)]
    logger = TensorBoardLogger(folder, name=None, version="tensorboard", default_hp_metric=False)
    logger.experiment.add_text("config", f"```yaml\n{yaml.safe_dump(config.model_dump())}\n```")
    precision: Any = device.precision or default_precision(accelerator)
    return pl.Trainer(
        accelerator=accelerator,
        devices=device.devices,
        num_nodes=device.num_nodes,
        strategy=device.strategy,
        precision=precision,
        max_epochs=-1 if settings.max_epochs is None else settings.max_epochs,
        max_steps=-1 if settings.max_steps is None else settings.max_steps,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.clip_norm,
        log_every_n_steps=settings.log_interval,
        logger=logger,
        callbacks=[*callbacks, *own, *([ProgressBar()] if settings.progress else [])],
        plugins=[AtomicCheckpointIO()],
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the data module shares out the rows itself
        enable_model_summary=False,
        enable_progress_bar=settings.progress,
    )


def record_hparams(trainer: pl.Trainer, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """Write the settings that a sweep may vary, with the final metrics, for TensorBoard's HParams."""
    if not trainer.is_global_zero:
        return
    final = {f"final/{name}": value for name, value in metrics.items()}
    # HParams would show a bool as 0 or 1. The metrics of the evaluation are announced here and follow with it.
    shown = {key: str(value).lower() if isinstance(value, bool) else value for key, value in settings.items()}
    writer = trainer.logger.experiment  # type: ignore[union-attr]
    for summary in hparams(shown, dict.fromkeys([*final, *TEST_METRICS], 0.0)):
        writer._get_file_writer().add_summary(summary)  # as Lightning does: a closed writer opens again
    trainer.logger.log_metrics(final, trainer.global_step)  # type: ignore[union-attr]
    trainer.logger.save()  # type: ignore[union-attr]


def losses_table(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """The validation losses before and after training as a small table."""
    rows = [f"{'':17}{'before':>10}{'after':>10}"]
    for name, key in (("validation loss", "loss"), ("perplexity", "perplexity")):
        for words, measure in ((name, f"val/{key}"), ("  response only", f"val/response_{key}")):
            rows.append(f"{words:17}{before[measure]:10.3f}{after[measure]:10.3f}")
    return "\n".join(rows)
