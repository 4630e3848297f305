"""Lightning's trainer with this project's callbacks, and what ends it."""

import logging
import math
import warnings
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import LightningEnvironment

from instruct_lm.config import TrainConfig
from instruct_lm.errors import InputError
from instruct_lm.io import processes
from instruct_lm.io.files import shown
from instruct_lm.io.run_files import BEST, LAST, PREVIOUS
from instruct_lm.training.callbacks import Patience, ValidateEvery
from instruct_lm.training.checkpoints import AtomicCheckpointIO, Resumable
from instruct_lm.training.progress import Progress, saying
from instruct_lm.training.saving import SaveBest, SaveLast
from instruct_lm.training.signals import StopSignals
from instruct_lm.training.strategies import make_strategy
from instruct_lm.training.tensorboard import Curves

log = logging.getLogger(__name__)

_HARMLESS = (
    ".*LeafSpec.*deprecated.*",  # Lightning 2.6 with torch 2.13
    ".*does not have many workers.*",
    ".*smaller than the logging interval.*",
    ".*sync_dist=True.*",  # the module adds up the sums of all processes itself
)


def make_trainer(
    config: TrainConfig, accelerator: str, callbacks: Sequence[Callback], run_id: str | None = None, step: int = 0
) -> pl.Trainer:
    """Make the trainer of a run, which writes TensorBoard events and checkpoints.

    Args:
        config: The run's configuration.
        accelerator: ``cpu``, ``gpu`` or ``mps``.
        callbacks: Callbacks besides those for progress, validation and checkpoints; they come first.
        run_id: Of the run; its checkpoints carry it.
        step: The step from which a resumed run goes on. TensorBoard forgets what was logged after it, by a process that
            was killed before its next checkpoint.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _HARMLESS:
        warnings.filterwarnings("ignore", message)
    settings, device, folder = config.trainer, config.device, config.folder
    signals = StopSignals()
    own: list[Callback] = [signals, ValidateEvery(settings.val_interval), SaveBest(folder / BEST)]
    own += [Patience(settings.patience)] if settings.patience else []
    every = settings.checkpoint_steps, settings.checkpoint_minutes
    own += [SaveLast(folder / LAST, folder / PREVIOUS, signals, *every)]  # comes last: it keeps the state of the others
    # An empty version: the progress bar would show any other.
    logger = Curves(folder, name="tensorboard", version="", default_hp_metric=False, purge_step=step if step else None)
    logger.experiment.add_text("config", f"```yaml\n{yaml.safe_dump(config.model_dump())}\n```")
    log.info("device: %s; output: %s", accelerator, shown(folder))
    plugins: list[Any] = [AtomicCheckpointIO(run_id)]
    if processes.is_launched():  # also within a job of a cluster's scheduler, which Lightning would ask
        plugins.append(LightningEnvironment())
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=device.devices,
        num_nodes=device.num_nodes,
        strategy=make_strategy(device.strategy, processes.world_size()),
        precision=device.precision,
        max_epochs=settings.max_epochs or -1,
        max_steps=settings.max_steps or -1,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.clip_norm,
        log_every_n_steps=settings.log_interval,
        logger=logger,
        callbacks=[*callbacks, *own, *([Progress()] if settings.progress else [])],
        plugins=plugins,
        enable_checkpointing=False,  # by Lightning's own callback
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the data module shares out the rows itself
        enable_model_summary=False,
        enable_progress_bar=settings.progress,
    )
    save = trainer.save_checkpoint

    def save_and_say(*args: Any, **kwargs: Any) -> None:
        with saying(trainer, "saving checkpoint"):
            save(*args, **kwargs)

    trainer.save_checkpoint = save_and_say  # type: ignore[method-assign]
    # Lightning's own handler of SIGTERM speaks to the other processes at once, which may be elsewhere: it would hang.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def check_limits(config: TrainConfig, checkpoint: Resumable) -> None:
    """Check that a run to resume is not longer already than its limits.

    Raises:
        InputError: It is.
    """
    done = {"max_epochs": checkpoint.epochs, "max_steps": checkpoint.step}
    for name, number in done.items():
        if (limit := getattr(config.trainer, name)) is not None and number > limit:
            unit = name.removeprefix("max_")
            raise InputError(
                f"trainer.{name}={limit}: the run has done {number} {unit} already. Give {number} or more."
            )


def why_ended(trainer: pl.Trainer) -> str:
    """The limit that ended training: ``max_steps``, ``max_epochs`` or ``patience``."""
    if trainer.global_step < trainer.estimated_stepping_batches:
        return "patience"
    return "max_steps" if trainer.global_step == trainer.max_steps else "max_epochs"


def epochs_done(trainer: pl.Trainer) -> float:
    """The epochs of a run so far; Lightning's count of one that ended in the middle depends on how the run ended."""
    steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    return round(trainer.global_step / steps, 2)
